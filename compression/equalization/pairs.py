"""Places in a program's graph where a scale per channel can go in and come out again without changing any output.

What makes a tensor (a norm's affine part, or a layer) is divided by s, and every layer that reads it is multiplied with
s. Between them may lie what a positive factor passes through: ReLU, pooling, dropout, views, and the values of an
attention, which are averaged channel by channel. Any other reader, such as a residual sum or GELU, rules the place out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fleetpress.compression.arguments import arguments
from fleetpress.compression.layers import LAYER_OPS, LayerOp
from fleetpress.compression.program import STORED, aliases, tensors

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer's `weight` by state name whose dim `axis` runs over the channels, each of them `repeat` times."""

    weight: str
    axis: int
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """Stored tensors whose dim (the number beside the name) is divided by a scale [channels], and all their readers.

    `kind` says whether they are a layer's weight (the first one) and bias, or a norm's affine parameters.
    """

    kind: Literal["layer", "norm"]
    producers: tuple[tuple[str, int], ...]
    readers: tuple[Reader, ...]
    channels: int


@dataclass(frozen=True, kw_only=True)
class _Channels:
    """Where the channels lie in a tensor: one dim, or two (heads, entries of a head); each `repeat` times in a row."""

    dims: tuple[int, ...]
    repeat: int = 1


def places(program: ExportedProgram) -> tuple[Place, ...]:
    """Every place in the order of the graph; parameters that are used or stored twice are left alone."""
    stored = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in STORED and spec.target is not None
    }
    tied = aliases(tensors(program))
    shared = set(tied) | set(tied.values())

    def own(node: Any) -> str | None:
        """The state name of a parameter that only its one user reads."""
        name = stored.get(node.name) if isinstance(node, fx.Node) else None
        return name if name is not None and name not in shared and len(node.users) == 1 else None

    found = []
    for node in program.graph.nodes:
        made = _producer(node, own)
        if made is None:
            continue
        kind, producers, start, channels = made
        readers = _readers(node, start, channels, own)
        if readers:
            found.append(
                Place(kind=kind, producers=tuple(producers), readers=tuple(readers), channels=channels)
            )
    return tuple(found)


_NORMS = {  # and where the channels lie in their output
    aten.layer_norm.default: -1,
    aten.rms_norm.default: -1,
    aten.batch_norm.default: 1,
    aten._native_batch_norm_legit_no_training.default: 1,
}
Own = Callable[[Any], str | None]
Made = tuple[Literal["layer", "norm"], list[tuple[str, int]], _Channels, int]


def _producer(node: fx.Node, own: Own) -> Made | None:
    """What divides the node's channels by a scale, and where they lie in its output."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    last = node.meta["val"].dim() - 1
    op = LAYER_OPS.get(node.target)  # type: ignore[call-overload]
    if op is not None:
        return _layer(node, op, own)
    if node.target in _NORMS:
        told = arguments(node)
        if len(told.get("normalized_shape", [0])) != 1:
            return None
        return _affine([told.get("weight"), told.get("bias")], own, _NORMS[node.target] % (last + 1))
    if node.target is aten.mul.Tensor:  # the affine part of a norm that is written out
        for factor, other in (node.args[:2], node.args[1::-1]):
            if own(factor) and isinstance(other, fx.Node) and _size(factor) == node.meta["val"].shape[-1]:
                return _affine([factor], own, last)
    return None


def _layer(node: fx.Node, op: LayerOp, own: Own) -> Made | None:
    if op.kind == "Embedding" or op.kind.startswith("ConvTranspose") or len(node.args) <= op.weight:
        return None
    weight = own(node.args[op.weight])
    bias = node.args[op.bias] if op.bias is not None and len(node.args) > op.bias else None
    value = node.args[op.weight].meta["val"] if weight else None  # type: ignore[union-attr]
    if weight is None or value is None or value.dim() < 2 or (bias is not None and own(bias) is None):
        return None
    producers = [(weight, op.axis)]
    if bias is not None:
        if _size(bias) != value.shape[op.axis]:
            return None
        producers.append((str(own(bias)), 0))
    dims = node.meta["val"].dim()
    at = dims - 1 if op.kind == "Linear" else dims - (value.dim() - 1)
    return "layer", producers, _Channels(dims=(at,)), int(value.shape[op.axis])


def _affine(parts: Sequence[Any], own: Own, at: int) -> Made | None:
    given = [part for part in parts if part is not None]
    names = [own(part) for part in given]
    sizes = [_size(part) for part in given]
    if not names or None in names or None in sizes:
        return None
    return "norm", [(str(name), 0) for name in names], _Channels(dims=(at,)), int(sizes[0] or 0)


def _size(node: Any) -> int | None:
    """Entries of a vector; None for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return int(value.shape[0]) if isinstance(value, Tensor) and value.dim() == 1 else None


def _readers(node: fx.Node, at: _Channels, channels: int, own: Own) -> list[Reader] | None:
    """All layers that read the node's channels; None if anything else reads them."""
    found: list[Reader] = []
    for user in node.users:
        reader = _reader(user, node, at, channels, own)
        if reader is not None:
            found.append(reader)
            continue
        there = _passed(user, node, at)
        behind = _readers(user, there, channels, own) if there is not None else None
        if behind is None:
            return None
        found += behind
    return found or None


def _reader(user: fx.Node, node: fx.Node, at: _Channels, channels: int, own: Own) -> Reader | None:
    op = LAYER_OPS.get(user.target) if user.op == "call_function" else None  # type: ignore[call-overload]
    if op is None or op.kind == "Embedding" or op.kind.startswith("ConvTranspose"):
        return None
    weight = own(user.args[op.weight]) if len(user.args) > op.weight else None
    if weight is None or user.args[op.input] is not node or user.all_input_nodes.count(node) != 1:
        return None
    value = user.args[op.weight].meta["val"]
    dims = node.meta["val"].dim()
    wanted = dims - 1 if op.kind == "Linear" else dims - (value.dim() - 1)
    if at.dims != (wanted,) or (op.kind != "Linear" and arguments(user)["groups"] != 1):
        return None
    axis = 1 - op.axis if op.kind == "Linear" else 1
    if value.shape[axis] != channels * at.repeat:
        return None
    return Reader(weight=weight, axis=axis, repeat=at.repeat)


_SAME_DIMS = {
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
}
_POOLING = {
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.max_pool1d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default,
}
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
}


def _passed(user: fx.Node, node: fx.Node, at: _Channels) -> _Channels | None:
    """Where the channels are behind the `user`; None if a positive factor does not pass through it."""
    result = user.meta.get("val")
    if user.op != "call_function" or not isinstance(result, Tensor):
        return None
    value, first = node.meta["val"], user.args[0] is node
    if first and user.target in _SAME_DIMS:
        return at
    if first and user.target in _POOLING:
        return at if at.dims == (1,) and value.dim() == result.dim() else None
    if first and user.target in (aten.transpose.int, aten.permute.default):
        order = _order(user, value.dim())
        return _Channels(dims=tuple(order.index(dim) for dim in at.dims), repeat=at.repeat)
    if first and user.target in _VIEWS:
        return _viewed(value, result, at)
    return _averaged(user, node, at)


def _order(user: fx.Node, dims: int) -> list[int]:
    """Which dim of the old tensor each dim of the new one is."""
    told = arguments(user)
    if user.target is aten.permute.default:
        return [int(dim) % dims for dim in told["dims"]]
    one, other = int(told["dim0"]) % dims, int(told["dim1"]) % dims
    order = list(range(dims))
    order[one], order[other] = other, one
    return order


def _averaged(user: fx.Node, node: fx.Node, at: _Channels) -> _Channels | None:
    """The values of an attention, which are averaged over positions: every channel stays what it is."""
    attention = aten.scaled_dot_product_attention.default
    if user.target is attention and len(user.args) > 2 and user.args[2] is node:
        place, grouped = 2, bool(arguments(user)["enable_gqa"])
    elif user.target is aten.matmul.default and user.args[1] is node:
        place, grouped = 1, False
    else:
        return None
    others = [arg for index, arg in enumerate(user.args) if index != place]
    value, result = node.meta["val"], user.meta["val"]
    same = value.dim() == result.dim() == 4 and str(value.shape[:2]) == str(result.shape[:2])
    if grouped or node in others or at.dims != (1, 3) or not same:
        return None
    return at


def _viewed(value: Tensor, result: Tensor, at: _Channels) -> _Channels | None:
    """Views that split the last dim into heads, join heads again, or leave the channels' dim as it is."""
    old, new = [str(size) for size in value.shape], [str(size) for size in result.shape]
    last = len(old) - 1
    if old == new:
        return at
    if at.dims == (last,) and len(new) == len(old) + 1 and old[:-1] == new[:-2]:
        return _Channels(dims=(last, last + 1)) if at.repeat == 1 else None
    if at.dims == (last - 1, last) and len(new) == len(old) - 1 and old[:-2] == new[:-1]:
        return _Channels(dims=(last - 1,))
    if at.dims == (last,) and old[-1] == new[-1]:
        return _Channels(dims=(len(new) - 1,), repeat=at.repeat)
    if (
        at.dims == (1,) and len(new) == 2 and old[0] == new[0] and last > 1
    ):  # a map of every channel becomes a row
        spots = list(_whole(value.shape[2:]))
        repeat = at.repeat * int(torch.tensor(spots).prod()) if len(spots) == last - 1 else 0
        return _Channels(dims=(1,), repeat=repeat) if repeat else None
    return None


def _whole(sizes: Sequence[Any]) -> Iterator[int]:
    return (size for size in sizes if isinstance(size, int))
