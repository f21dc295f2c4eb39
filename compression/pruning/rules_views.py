"""How labels pass through views, which split dims and merge them."""

import math
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from torch import fx

from fleetpress.compression.arguments import operands
from fleetpress.compression.pruning.labels import Atoms, Axis, Labelling, Labels, Value


@dataclass(frozen=True)
class Piece:
    """A dim, or one of the two factors of a dim of unknown size: what is not known, and the number beside it."""

    dim: int
    size: int
    known: bool
    axis: Axis = None


def reshape(flow: Labelling, node: fx.Node) -> Value:
    """Views are products of blocks; within a block that holds a labelled dim the labels are laid out and read back.

    A dim of batch times heads has a label for every head: they recur along it.
    """
    source = operands(node)[0]
    x = flow.of(source)
    result: list[Axis] = [None] * node.meta["val"].dim()
    if all(axis is None for axis in x):
        return tuple(result)
    apart = bool(flow.reading.kinds)
    before, after = _pieces(source, x, apart=apart), _pieces(node, tuple(result), apart=apart)
    blocks = _blocks([piece.size for piece in before], [piece.size for piece in after])
    if blocks is None:
        for axis in x:
            flow.pin(axis, node, "rearranges sizes that are not known")
        return tuple(result)
    for ins, outs in blocks:
        chosen, labels = _through(flow, node, [before[i] for i in ins], [after[i] for i in outs], before[-1])
        if labels is not None:
            result[after[outs[chosen]].dim] = labels
    return tuple(result)


def _pieces(node: Any, labels: Labels, *, apart: bool) -> list[Piece]:
    """The dims of a tensor; `apart` splits those of unknown size into that size and the number that multiplies it."""
    pieces = []
    for dim, (size, axis) in enumerate(zip(node.meta["val"].shape, labels, strict=True)):
        if isinstance(size, int):
            pieces.append(Piece(dim, size, True, axis))
            continue
        times = int(size.node.expr.as_coeff_Mul()[0]) if apart else 1
        pieces.append(Piece(dim, _stand_in(size.node.expr) // times, False))
        if times > 1:
            pieces.append(Piece(dim, times, True, None if axis is None else np.resize(axis, times)))
    return pieces


def _through(
    flow: Labelling, node: fx.Node, ins: list[Piece], outs: list[Piece], last: Piece
) -> tuple[int, Axis]:
    """The place among `outs` that carries a block's labels, and the labels."""
    labelled = [piece for piece in ins if piece.axis is not None]
    if not flow.reading.kinds:
        labelled.sort(key=lambda piece: -piece.size)
    elif flow.reading.unwanted == "head":
        labelled.reverse()
    for piece in labelled[1:]:
        flow.pin(piece.axis, node, "merges two kinds of units")
    if not labelled:
        return 0, None
    carrier = labelled[0]
    axis = carrier.axis
    assert axis is not None
    if len(ins) == len(outs) == 1:
        return 0, axis
    share = _unknown_share(ins, outs)
    if share is None or (share > 1 and carrier is ins[0]):
        flow.pin(axis, node, "merges units with a dim of unknown size")
        return 0, None
    sizes_in, sizes_out = [piece.size for piece in ins], [piece.size for piece in outs]
    sizes_in[0], sizes_out[0] = sizes_in[0] // share, sizes_out[0] // share
    behind = [1] * (len(ins) - ins.index(carrier) - 1)
    block = np.broadcast_to(axis.reshape(-1, *behind), sizes_in).reshape(sizes_out)
    return _carry(flow, node, block, first=share > 1, heads=carrier is last)


def _unknown_share(ins: list[Piece], outs: list[Piece]) -> int | None:
    """The part of unknown size that the first dims of a block have in common: 1 without, None when it is elsewhere."""
    unknown = [piece for piece in ins if not piece.known]
    if not unknown:
        return 1
    one, other = ins[0].size, outs[0].size
    if len(unknown) > 1 or unknown[0] is not ins[0] or max(one, other) % min(one, other):
        return None
    return min(one, other)


def _carry(flow: Labelling, node: fx.Node, block: Atoms, *, first: bool, heads: bool) -> tuple[int, Axis]:
    """Which dim of a block of labels carries the units, and its labels; not the `first` if that one is larger still."""
    varies = [
        i
        for i in range(block.ndim)
        if not np.array_equal(block, np.broadcast_to(block.take([0], i), block.shape))
    ]
    candidates = [i for i in varies if i > 0 or not first]
    if not candidates:
        flow.pin(block.reshape(-1), node, "spreads units over a dim that cannot shrink")
        return 0, None
    if len(varies) == 1:
        return varies[0], np.moveaxis(block, varies[0], 0).reshape(block.shape[varies[0]], -1)[:, 0]
    # The last dim is split into heads, which come first; a channel dim into channels, of which there are most.
    order = candidates if heads else sorted(candidates, key=lambda i: (-block.shape[i], i))
    return flow.split(node, block, order)


def _stand_in(expression: Any) -> int:
    """A symbol becomes a large number of its own, so that equal products mean equal sizes."""
    numbers = {symbol: 2520 * (10**9 + crc32(str(symbol).encode())) for symbol in expression.free_symbols}
    return int(expression.subs(numbers))


def _blocks(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]] | None:
    """Runs of dims with equal products on both sides; dims of size 1 belong to none."""
    left = [(dim, size) for dim, size in enumerate(before) if size != 1]
    right = [(dim, size) for dim, size in enumerate(after) if size != 1]
    blocks = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (one := math.prod(s for _, s in ins)) != (other := math.prod(s for _, s in outs)):
            side, rest = (ins, left) if one < other else (outs, right)
            if not rest:
                return None
            side.append(rest.pop(0))
        blocks.append(([dim for dim, _ in ins], [dim for dim, _ in outs]))
    return None if left or right else blocks
