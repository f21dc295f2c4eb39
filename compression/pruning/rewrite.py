"""Sizes, offsets and group counts that stand in a graph as numbers, written anew after a deletion."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from fleetpress.compression.arguments import arguments, is_single, operands, replaced, size_of
from fleetpress.compression.errors import PruningError
from fleetpress.compression.program import ProgramEditor
from fleetpress.compression.pruning.labels import Axis, Coupling, Labels, Mask
from fleetpress.compression.pruning.rules_norms import keeps_groups
from fleetpress.compression.pruning.rules_pointwise import reduced_dims
from fleetpress.compression.pruning.rules_shapes import bounds

aten = torch.ops.aten


class Surgery:
    """A deletion under way: `gone[atom]` says whether an index leaves."""

    def __init__(self, found: Coupling, gone: Mask, editor: ProgramEditor) -> None:
        self._found = found
        self._gone = gone
        self._scaled: set[str] = set()
        self.editor = editor
        self.normalized = found.reading.normalized

    def results(self, node: object) -> list[Labels]:
        """Labels of every tensor that the node gives."""
        value = self._found.values.get(node.name) if isinstance(node, fx.Node) else None
        return value if isinstance(value, list) else [value or ()]

    def labels(self, node: object) -> Labels:
        """Labels of the node's first tensor."""
        return self.results(node)[0]

    def kept(self, axis: Axis) -> int:
        """How many indices of a labelled dim stay."""
        assert axis is not None
        return len(axis) - int(self._gone[axis].sum())

    def shrinks(self, axis: Axis) -> bool:
        """Whether the dim loses anything."""
        return axis is not None and bool(self._gone[axis].any())

    def scale(self, placeholder: fx.Node, factor: float) -> None:
        """Multiply a stored tensor, and those that are tied to it, once."""
        owner = next(name for name, node in self.editor.placeholders.items() if node is placeholder)
        value = self.editor.values[owner]
        tied = [name for name, other in self.editor.values.items() if other is value]
        if owner not in self._scaled:
            scaled = value.detach() * factor
            made = (
                torch.nn.Parameter(scaled, value.requires_grad)
                if isinstance(value, torch.nn.Parameter)
                else scaled
            )
            for name in tied:
                self.editor.set(name, made)
            self._scaled.update(tied)

    def change(self, node: fx.Node, **changes: Any) -> None:
        """Give some of the node's arguments new values."""
        args, kwargs = replaced(node, **changes)
        self.editor.set_args(node, args, kwargs)


Rewrite: TypeAlias = Callable[[Surgery, fx.Node], None]


def rewrite(surgery: Surgery, node: fx.Node) -> None:
    """Make the node's numbers fit what is left."""
    rule = REWRITES.get(node.target)
    if rule is None:
        return
    touched = [
        *surgery.results(node),
        *(labels for item in node.all_input_nodes for labels in surgery.results(item)),
    ]
    if any(surgery.shrinks(axis) for labels in touched for axis in labels):
        rule(surgery, node)


def _sizes(name: str) -> Rewrite:
    def rule(surgery: Surgery, node: fx.Node) -> None:
        sizes = list(arguments(node)[name])
        surgery.change(node, **{name: _shrunk(surgery, node, sizes, surgery.labels(node))})

    return rule


def _shrunk(surgery: Surgery, node: fx.Node, sizes: list[Any], labels: Labels, first: int = 0) -> list[Any]:
    """Sizes after the deletion; `labels` are those of the node's dims from `first` on."""
    worked_out = [
        dim for dim, axis in enumerate(labels) if surgery.shrinks(axis) and _unknown(node, first + dim)
    ]
    for dim, axis in enumerate(labels):
        if dim in worked_out and len(worked_out) == 1:
            sizes[dim] = -1
        elif surgery.shrinks(axis) and isinstance(sizes[dim], fx.Node):
            raise PruningError(f"{node.name}: its size {dim} is computed; `ignore` the layers before it")
        elif surgery.shrinks(axis) and (sizes[dim] != -1 or worked_out):
            sizes[dim] = surgery.kept(axis)
        elif worked_out and sizes[dim] == -1 and not _unknown(node, first + dim):
            sizes[dim] = size_of(node, first + dim)
    return sizes


def _unknown(node: fx.Node, dim: int) -> bool:
    return not isinstance(size_of(node, dim), int)


def _unflatten(surgery: Surgery, node: fx.Node) -> None:
    args = arguments(node)
    sizes, labels = list(args["sizes"]), surgery.labels(node)
    dim = int(args["dim"]) % (len(labels) - len(sizes) + 1)
    surgery.change(node, sizes=_shrunk(surgery, node, sizes, labels[dim : dim + len(sizes)], dim))


def _parts(surgery: Surgery, node: fx.Node) -> None:
    """Parts that were equal need not stay so: every size is written out."""
    x, dim = operands(node)[0], int(arguments(node)["dim"])
    if not surgery.shrinks(surgery.labels(x)[dim]):
        return
    sizes = [surgery.kept(labels[dim]) for labels in surgery.results(node)]
    surgery.editor.set_target(node, aten.split_with_sizes.default, (x, sizes, dim))


def _part(surgery: Surgery, node: fx.Node) -> None:
    dim = int(arguments(node)["dim"])
    axis = surgery.labels(operands(node)[0])[dim]
    if axis is None or not surgery.shrinks(axis):
        return
    found = bounds(node, len(axis))
    assert found is not None, "a slice that is computed is pinned"
    start, stop = surgery.kept(axis[: found[0]]), surgery.kept(axis[: max(found[:2])])
    if node.target is aten.narrow.default:
        surgery.change(node, start=start, length=stop - start)
    else:
        surgery.change(node, start=start, end=stop)


def _groups(surgery: Surgery, node: fx.Node) -> None:
    """Depthwise convolutions have a group for every channel that is left."""
    args = arguments(node)
    x, weight, groups = args["input"], args["weight"], int(args["groups"])
    labels = surgery.labels(x)
    channels = labels[1 if len(labels) == len(surgery.labels(weight)) else 0]
    if groups > 1 and channels is not None and groups == len(channels):
        surgery.change(node, groups=surgery.kept(channels))


def _norm_groups(surgery: Surgery, node: fx.Node) -> None:
    args = arguments(node)
    channels = surgery.labels(operands(node)[0])[1]
    if channels is None:
        return
    if keeps_groups(surgery.normalized, node, channels):
        share = surgery.kept(channels) / len(channels)
        surgery.scale(args["weight"], math.sqrt(1 / share))
        surgery.change(node, eps=float(args["eps"]) / share)
    else:
        surgery.change(node, num_groups=surgery.kept(channels) * int(args["num_groups"]) // len(channels))


def _norm_over_last(surgery: Surgery, node: fx.Node) -> None:
    """A channel that is gone counts as a zero in the mean of the squares, which weight and epsilon make up for."""
    args = arguments(node)
    channels = surgery.labels(args["input"])[-1]
    if channels is None or not surgery.shrinks(channels):
        return
    kept = surgery.kept(channels)
    share = kept / len(channels)
    eps = torch.finfo(node.meta["val"].dtype).eps if args["eps"] is None else float(args["eps"])
    surgery.scale(args["weight"], math.sqrt(1 / share))
    surgery.change(node, normalized_shape=[kept], eps=eps / share)


def _mean(surgery: Surgery, node: fx.Node) -> None:
    """Keep the divisor: what is gone counts as zero."""
    x = surgery.labels(operands(node)[0])
    share = 1.0
    for dim in reduced_dims(arguments(node).get("dim"), len(x)):
        axis = x[dim]
        if axis is not None and surgery.shrinks(axis):
            share *= surgery.kept(axis) / len(axis)
    if share != 1:
        surgery.editor.multiply(node, share)


def _attention_scale(surgery: Surgery, node: fx.Node) -> None:
    """The default scale follows the head's size; the scale that the model was trained with stays."""
    args = arguments(node)
    if args["scale"] is None and surgery.shrinks(surgery.labels(args["query"])[-1]):
        surgery.change(node, scale=1 / math.sqrt(int(size_of(args["query"], -1))))


def _repeats(surgery: Surgery, node: fx.Node) -> None:
    """One head that is repeated for all heads of the queries is repeated less often."""
    args = arguments(node)
    changes: dict[str, Any] = {"output_size": None}
    if args["dim"] is not None and is_single(args["self"], int(args["dim"])):
        axis = surgery.labels(node)[int(args["dim"])]
        changes |= {} if axis is None else {"repeats": surgery.kept(axis)}
    surgery.change(node, **changes)


REWRITES: dict[Any, Rewrite] = {
    aten.view.default: _sizes("size"),
    aten._unsafe_view.default: _sizes("size"),
    aten.reshape.default: _sizes("shape"),
    aten.expand.default: _sizes("size"),
    aten.broadcast_to.default: _sizes("size"),
    aten.zeros.default: _sizes("size"),
    aten.ones.default: _sizes("size"),
    aten.full.default: _sizes("size"),
    aten.new_zeros.default: _sizes("size"),
    aten.new_ones.default: _sizes("size"),
    aten.new_full.default: _sizes("size"),
    aten.unflatten.int: _unflatten,
    aten.split.Tensor: _parts,
    aten.split.sizes: _parts,
    aten.split_with_sizes.default: _parts,
    aten.chunk.default: _parts,
    aten.tensor_split.sections: _parts,
    aten.slice.Tensor: _part,
    aten.narrow.default: _part,
    aten.conv1d.default: _groups,
    aten.conv1d.padding: _groups,
    aten.conv2d.default: _groups,
    aten.conv2d.padding: _groups,
    aten.conv3d.default: _groups,
    aten.conv3d.padding: _groups,
    aten.conv_transpose1d.default: _groups,
    aten.conv_transpose2d.input: _groups,
    aten.conv_transpose3d.input: _groups,
    aten.group_norm.default: _norm_groups,
    aten.layer_norm.default: _norm_over_last,
    aten.native_layer_norm.default: _norm_over_last,
    aten.rms_norm.default: _norm_over_last,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.scaled_dot_product_attention.default: _attention_scale,
    aten.repeat_interleave.self_int: _repeats,
}
