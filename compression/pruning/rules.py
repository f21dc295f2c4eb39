"""Every operator that the analysis understands, with its rule. An operator that is not here holds its inputs back."""

from typing import Any

import torch
from torch import fx

from fleetpress.compression.pruning.labels import Axis, Labelling, Rule, Value
from fleetpress.compression.pruning.rules_layers import LAYER_RULES, addmm, attention, linear, matmul
from fleetpress.compression.pruning.rules_norms import NORM_RULES
from fleetpress.compression.pruning.rules_pointwise import (
    POINTWISE_RULES,
    along_dim,
    assertion,
    elementwise,
    no_tensor,
)
from fleetpress.compression.pruning.rules_recurrent import RECURRENT_RULES
from fleetpress.compression.pruning.rules_shapes import SHAPE_RULES, permute, unsqueeze
from fleetpress.compression.pruning.rules_views import reshape

RULES: dict[Any, Rule] = {
    **LAYER_RULES,
    **RECURRENT_RULES,
    **NORM_RULES,
    **POINTWISE_RULES,
    **SHAPE_RULES,
}


# Rules that may meet labels that recur along a dim of unknown size.
RECURRING: tuple[Rule, ...] = (
    reshape,
    permute,
    elementwise,
    matmul,
    addmm,
    linear,
    along_dim,
    attention,
    unsqueeze,
    no_tensor,
    assertion,
)


def apply_rule(flow: Labelling, node: fx.Node) -> Value:
    """Labels of what the node gives. Safe by default: nothing that flows into an unknown operator can be deleted."""
    rule = RULES.get(node.target)
    if rule not in RECURRING:
        for source in node.all_input_nodes:
            for axis in _recurring(flow, source):
                flow.pin(axis, node, "takes a dim of batch and units apart")
    if rule is not None:
        value = rule(flow, node)
        if _fits(value, node.meta.get("val")):
            return value
    for source in node.all_input_nodes:
        value = flow.values.get(source.name)
        for labels in value if isinstance(value, list) else [value or ()]:
            for axis in labels:
                flow.pin(axis, node, f"the operator {node.target} is not understood")
    return plain(node.meta.get("val"))


def _recurring(flow: Labelling, source: fx.Node) -> list[Axis]:
    """Labelled dims of unknown size, such as batch times heads."""
    value, results = flow.values.get(source.name), source.meta.get("val")
    if not isinstance(value, tuple) or not isinstance(results, torch.Tensor):
        return []
    return [axis for axis, size in zip(value, results.shape, strict=True) if not isinstance(size, int)]


def _fits(value: Value, results: object) -> bool:
    """Whether there is a label for every index of every dim; along a dim of unknown size labels recur."""
    if isinstance(results, torch.Tensor):
        return (
            isinstance(value, tuple)
            and len(value) == results.dim()
            and all(
                axis is None or not isinstance(size, int) or len(axis) == size
                for axis, size in zip(value, results.shape, strict=True)
            )
        )
    if isinstance(results, (list, tuple)):
        return isinstance(value, list) and all(map(_fits, value, results))
    return True


def plain(value: object) -> Value:
    """Labels that say: no dim of this can shrink."""
    if isinstance(value, torch.Tensor):
        return tuple(None for _ in value.shape)
    if isinstance(value, (list, tuple)):
        return [labels if isinstance(labels := plain(entry), tuple) else () for entry in value]
    return None
