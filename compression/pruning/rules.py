"""Every operator that the analysis understands, with its rule. An operator that is not here holds its inputs back."""

from typing import Any

import torch
from torch import fx

from fleetpress.compression.pruning.labels import Labelling, Rule, Value
from fleetpress.compression.pruning.rules_layers import LAYER_RULES
from fleetpress.compression.pruning.rules_pointwise import POINTWISE_RULES
from fleetpress.compression.pruning.rules_shapes import SHAPE_RULES

RULES: dict[Any, Rule] = {**LAYER_RULES, **POINTWISE_RULES, **SHAPE_RULES}


def apply_rule(flow: Labelling, node: fx.Node) -> Value:
    """Labels of what the node gives. Safe by default: nothing that flows into an unknown operator can be deleted."""
    rule = RULES.get(node.target)
    if rule is not None:
        return rule(flow, node)
    for source in node.all_input_nodes:
        value = flow.values.get(source.name)
        for labels in value if isinstance(value, list) else [value or ()]:
            for axis in labels:
                flow.pin(axis, node, f"the operator {node.target} is not understood")
    return plain(node.meta.get("val"))


def plain(value: object) -> Value:
    """Labels that say: no dim of this can shrink."""
    if isinstance(value, torch.Tensor):
        return tuple(None for _ in value.shape)
    if isinstance(value, (list, tuple)):
        return [labels if isinstance(labels := plain(entry), tuple) else () for entry in value]
    return None
