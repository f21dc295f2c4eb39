"""Normalization with a scale and a shift for every channel, where it directly follows a layer."""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fleetpress.compression.program import STORED
from fleetpress.compression.selection import Layer

aten = torch.ops.aten
_NORMS = (
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.instance_norm.default,
    aten.group_norm.default,
)


def norm_after(program: ExportedProgram, layer: Layer) -> tuple[str, str] | None:
    """State names of the scale and the shift that the layer's units pass next and alone; None if there are none.

    The layer must be used once, and its result by nothing but the normalization.
    """
    if len(layer.nodes) != 1:
        return None
    node = next(node for node in program.graph.nodes if node.name == layer.nodes[0])
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _NORMS:
        return None
    stored = {
        spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.kind in STORED
    }
    found = [stored.get(item.name) for item in _affine(users[0]) if isinstance(item, fx.Node)]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    return found[0], found[1]


def _affine(node: fx.Node) -> tuple[Any, ...]:
    """The arguments `weight` and `bias`."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return tuple(
        node.args[at] if (at := names.index(name)) < len(node.args) else node.kwargs.get(name)
        for name in ("weight", "bias")
    )
