"""How labels pass through operators that rearrange dims: permutations, concatenations, parts."""

import operator
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import fx

from fleetpress.compression.arguments import arguments, is_single, operands, size_of
from fleetpress.compression.pruning.labels import Axis, Labelling, Labels, Rule, Value
from fleetpress.compression.pruning.rules_views import reshape

aten = torch.ops.aten


def permute(flow: Labelling, node: fx.Node) -> Value:
    x = flow.of(operands(node)[0])
    return tuple(x[dim] for dim in _order(node, len(x)))


def _order(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in operands(node)[1]]
    if len(operands(node)) == 3:
        one, other = (int(dim) % rank for dim in operands(node)[1:])
        order[one], order[other] = order[other], order[one]
    elif rank > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return order


def move(flow: Labelling, node: fx.Node) -> Value:
    x = flow.of(operands(node)[0])
    sources, targets = (
        [int(dim) % len(x) for dim in (item if isinstance(item, (list, tuple)) else [item])]
        for item in operands(node)[1:3]
    )
    placed = dict(zip(targets, sources, strict=True))
    rest = iter(dim for dim in range(len(x)) if dim not in sources)
    return tuple(x[placed[dim]] if dim in placed else x[next(rest)] for dim in range(len(x)))


def squeeze(flow: Labelling, node: fx.Node) -> Value:
    x = flow.of(operands(node)[0])
    dims = operands(node)[1] if len(operands(node)) > 1 else list(range(len(x)))
    chosen = {int(dim) % len(x) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    gone = {dim for dim in chosen if is_single(operands(node)[0], dim)}
    return tuple(axis for dim, axis in enumerate(x) if dim not in gone)


def unsqueeze(flow: Labelling, node: fx.Node) -> Value:
    x = list(flow.of(operands(node)[0]))
    x.insert(int(operands(node)[1]) % (len(x) + 1), None)
    return tuple(x)


def expand(flow: Labelling, node: fx.Node) -> Value:
    """A dim that is repeated can be repeated less often, so it gets labels of its own."""
    source = operands(node)[0]
    x = flow.of(source)
    shape = node.meta["val"].shape
    lead = len(shape) - len(x)
    return tuple(
        _made(flow, size) if dim < lead or (size != 1 and is_single(source, dim - lead)) else x[dim - lead]
        for dim, size in enumerate(shape)
    )


def expand_as(flow: Labelling, node: fx.Node) -> Value:
    source, like = operands(node)[:2]
    x, other = flow.of(source), flow.of(like)
    lead = len(other) - len(x)
    return tuple(
        other[dim]
        if dim < lead or is_single(source, dim - lead)
        else flow.unite(other[dim], x[dim - lead], node)
        for dim in range(len(other))
    )


def creation(flow: Labelling, node: fx.Node) -> Value:
    """zeros, ones, full: any size can be made smaller."""
    return tuple(_made(flow, size) for size in node.meta["val"].shape)


def _made(flow: Labelling, size: Any) -> Axis:
    return flow.fresh(size) if isinstance(size, int) and size > 1 else None


def repeat(flow: Labelling, node: fx.Node) -> Value:
    x, times = flow.of(operands(node)[0]), list(operands(node)[1])
    labels: list[Axis] = [None] * (len(times) - len(x))
    for axis, count in zip(x, times[len(labels) :], strict=True):
        if axis is not None and not isinstance(count, int):
            flow.pin(axis, node, "repeats units an unknown number of times")
        labels.append(np.tile(axis, count) if axis is not None and isinstance(count, int) else None)
    return tuple(labels)


def repeat_interleave(flow: Labelling, node: fx.Node) -> Value:
    args = arguments(node)
    x, dim, times = flow.of(args["self"]), args["dim"], args["repeats"]
    if dim is None:
        for axis in x:
            flow.pin(axis, node, "flattens units")
        return (None,)
    labels = list(x)
    axis = labels[dim]
    labels[dim] = None if axis is None else np.repeat(axis, times)
    if flow.reading.kinds and is_single(args["self"], dim):
        labels[dim] = _made(flow, size_of(node, dim))
    return tuple(labels)


def cat(flow: Labelling, node: fx.Node) -> Value:
    parts = [item for item in operands(node)[0] if item.meta["val"].dim() > 0]
    rank = node.meta["val"].dim()
    parts = [item for item in parts if item.meta["val"].dim() == rank]
    dim = int(arguments(node)["dim"]) % rank
    labels = list(_all_but(flow, node, parts, dim))
    axes = [flow.of(item)[dim] for item in parts]
    if all(axis is None for axis in axes):
        return tuple(labels)
    if not isinstance(size_of(node, dim), int):
        for axis in axes:
            flow.pin(axis, node, "joins units with a dim of unknown size")
        return tuple(labels)
    joined = []
    for item, axis in zip(parts, axes, strict=True):
        joined.append(flow.fresh(int(size_of(item, dim))) if axis is None else axis)
        if axis is None:
            flow.pin(joined[-1], node, "joins units with entries that belong to no layer")
    labels[dim] = np.concatenate(joined)
    return tuple(labels)


def stack(flow: Labelling, node: fx.Node) -> Value:
    parts = list(operands(node)[0])
    labels = list(_all_but(flow, node, parts, None))
    labels.insert(int(arguments(node)["dim"]) % (len(labels) + 1), None)
    return tuple(labels)


def _all_but(flow: Labelling, node: fx.Node, parts: list[Any], skip: int | None) -> Labels:
    merged = list(flow.of(parts[0]))
    for item in parts[1:]:
        for dim, axis in enumerate(flow.of(item)):
            if dim != skip:
                merged[dim] = flow.unite(merged[dim], axis, node)
    if skip is not None:
        merged[skip] = None
    return tuple(merged)


def parts(flow: Labelling, node: fx.Node) -> Value:
    """split, chunk, tensor_split, unbind's kin: every part takes its labels along."""
    x = flow.of(operands(node)[0])
    dim = int(arguments(node)["dim"]) % len(x)
    axis = x[dim]
    sizes = [item.shape[dim] for item in node.meta["val"]]
    if axis is None:
        return [x for _ in sizes]
    cuts = [0, *accumulate(sizes)]
    return [(*x[:dim], axis[start:stop], *x[dim + 1 :]) for start, stop in pairwise(cuts)]


def unbind(flow: Labelling, node: fx.Node) -> Value:
    x = flow.of(operands(node)[0])
    dim = int(arguments(node)["dim"]) % len(x)
    flow.pin(x[dim], node, "takes the units apart")
    return [(*x[:dim], *x[dim + 1 :]) for _ in node.meta["val"]]


def bounds(node: fx.Node, size: int) -> tuple[int, int, int] | None:
    """Start, stop and step of a slice or narrow in a dim of this size; None when they are not numbers."""
    args = arguments(node)
    if node.target is aten.narrow.default:
        start, stop, step = args["start"], None, 1
        if isinstance(start, int) and isinstance(args["length"], int):
            start %= size
            stop = start + args["length"]
    else:
        start, stop, step = args["start"] or 0, size if args["end"] is None else args["end"], args["step"]
    if not all(isinstance(item, int) for item in (start, stop, step)):
        return None
    return slice(start, stop, step).indices(size)


def part(flow: Labelling, node: fx.Node) -> Value:
    x = flow.of(operands(node)[0])
    dim = int(arguments(node)["dim"]) % len(x)
    axis = x[dim]
    if axis is None:
        return x
    found = bounds(node, len(axis))
    if found == (0, len(axis), 1):
        return x
    if found is None or found[2] != 1:
        flow.pin(axis, node, "takes units by their position")
        return (*x[:dim], None, *x[dim + 1 :])
    return (*x[:dim], axis[found[0] : found[1]], *x[dim + 1 :])


def select(flow: Labelling, node: fx.Node) -> Value:
    x = flow.of(operands(node)[0])
    dim = int(arguments(node)["dim"]) % len(x)
    flow.pin(x[dim], node, "takes one unit by its position")
    return (*x[:dim], *x[dim + 1 :])


def index_select(flow: Labelling, node: fx.Node) -> Value:
    x = flow.of(operands(node)[0])
    dim = int(arguments(node)["dim"]) % len(x)
    flow.pin(x[dim], node, "takes units by their position")
    return (*x[:dim], None, *x[dim + 1 :])


def index(flow: Labelling, node: fx.Node) -> Value:
    """x[i]: the indexed dim stays as it is; with several indexed dims all others stay, too."""
    x = flow.of(operands(node)[0])
    indices = list(operands(node)[1])
    indexed = [dim for dim, item in enumerate(indices) if item is not None]
    for item in indices:
        for axis in flow.of(item):
            flow.pin(axis, node, "positions are taken from it")
    for dim in indexed if len(indexed) == 1 else range(len(x)):
        flow.pin(x[dim], node, "takes units by their position")
    if len(indexed) != 1 or indices[indexed[0]].meta["val"].dtype is torch.bool:
        for axis in x:
            flow.pin(axis, node, "takes units by their position")
        return tuple(None for _ in node.meta["val"].shape)
    dim = indexed[0]
    inserted = tuple(None for _ in indices[dim].meta["val"].shape)
    return (*x[:dim], *inserted, *x[dim + 1 :])


def flip(flow: Labelling, node: fx.Node) -> Value:
    x = list(flow.of(operands(node)[0]))
    for dim in operands(node)[1]:
        axis = x[dim]
        x[dim] = None if axis is None else axis[::-1]
    return tuple(x)


def item(flow: Labelling, node: fx.Node) -> Value:
    values = flow.values.get(operands(node)[0].name)
    return values[operands(node)[1]] if isinstance(values, list) else None


def table(*groups: tuple[tuple[Any, ...], Rule]) -> dict[Any, Rule]:
    return {target: rule for targets, rule in groups for target in targets}


SHAPE_RULES: dict[Any, Rule] = table(
    ((aten.view.default, aten._unsafe_view.default, aten.reshape.default), reshape),
    ((aten.flatten.using_ints, aten.unflatten.int), reshape),
    ((aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default), permute),
    ((aten.t.default, aten.numpy_T.default, aten.mT.default), permute),
    ((aten.movedim.int, aten.movedim.intlist), move),
    ((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), squeeze),
    ((aten.unsqueeze.default,), unsqueeze),
    ((aten.expand.default, aten.broadcast_to.default), expand),
    ((aten.expand_as.default,), expand_as),
    ((aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default), creation),
    ((aten.new_ones.default, aten.new_full.default), creation),
    ((aten.repeat.default,), repeat),
    ((aten.repeat_interleave.self_int,), repeat_interleave),
    ((aten.cat.default, aten.concat.default), cat),
    ((aten.stack.default,), stack),
    ((aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default), parts),
    ((aten.chunk.default, aten.tensor_split.sections), parts),
    ((aten.unbind.int,), unbind),
    ((aten.slice.Tensor, aten.narrow.default), part),
    ((aten.select.int,), select),
    ((aten.index_select.default,), index_select),
    ((aten.index.Tensor,), index),
    ((aten.flip.default,), flip),
    ((operator.getitem,), item),
)
