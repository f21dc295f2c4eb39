"""How labels pass through norms that mix channels: layer norm, RMS norm, group norm.

Deleting a channel changes the statistics of the others, so channels stay unless `normalized` ones were asked for. Then
the norm's weight and epsilon are scaled (`compression/pruning/rewrite.py`) so that a deleted channel counts as a zero
in the mean of the squares. For an RMS norm that is exact: the result is that of the channel held at zero. A layer or
group norm also subtracts the mean, which becomes the mean of what is left.
"""

import torch
from torch import fx

from fleetpress.compression.arguments import arguments
from fleetpress.compression.pruning.labels import Atoms, Axis, Labelling, Value
from fleetpress.compression.pruning.rules_pointwise import STATISTICS, each_result

aten = torch.ops.aten


def norm_over_last(flow: Labelling, node: fx.Node) -> Value:
    """layer_norm, rms_norm: statistics over the last dims."""
    args = arguments(node)
    x = flow.of(args["input"])
    vectors = [args[name] for name in ("weight", "bias") if isinstance(args.get(name), fx.Node)]
    split = len(x) - len(args["normalized_shape"])
    if flow.reading.normalized and split == len(x) - 1 and scalable(args["weight"]):
        for vector in vectors:
            flow.unite(x[-1], flow.of(vector)[0], node)
        flow.mark(x[-1], "normalized")
        return each_result(node, x)
    for axis in [*x[split:], *(axis for vector in vectors for axis in flow.of(vector))]:
        flow.pin(axis, node, STATISTICS)
    return each_result(node, x)


def scalable(weight: object) -> bool:
    """Whether a norm has a stored weight that nobody but norms reads, so that it can be scaled."""
    return (
        isinstance(weight, fx.Node)
        and weight.op == "placeholder"
        and all(user.target in NORM_RULES and user.args[0] is not weight for user in weight.users)
    )


def group_norm(flow: Labelling, node: fx.Node) -> Value:
    """Statistics of every group are its own: groups may go, as a whole; or the same channels of every group."""
    args = arguments(node)
    x = flow.of(args["input"])
    channels = x[1]
    for name in ("weight", "bias"):
        if isinstance(args[name], fx.Node):
            flow.unite(channels, flow.of(args[name])[0], node)
    if channels is not None:
        _groups(flow, node, channels)
    for axis in (x[0], *x[2:]):
        flow.pin(axis, node, STATISTICS)
    return each_result(node, (None, channels, *(None for _ in x[2:])))


def _groups(flow: Labelling, node: fx.Node, channels: Atoms) -> None:
    rows = channels.reshape(int(arguments(node)["num_groups"]), -1)
    if keeps_groups(flow.reading.normalized, node, channels):
        flow.unite_rows(rows.T)
        flow.mark(channels, "normalized")
    elif len(rows) == 1:
        flow.pin(channels, node, STATISTICS)
    else:
        flow.unite_rows(rows)


def keeps_groups(normalized: bool, node: fx.Node, channels: Axis) -> bool:
    """Whether a group norm loses channels of every group, in place of groups."""
    groups = int(arguments(node)["num_groups"])
    return (
        normalized and channels is not None and groups < len(channels) and scalable(arguments(node)["weight"])
    )


NORM_RULES = {
    aten.layer_norm.default: norm_over_last,
    aten.native_layer_norm.default: norm_over_last,
    aten.rms_norm.default: norm_over_last,
    aten.group_norm.default: group_norm,
}
