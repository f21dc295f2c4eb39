"""What a program gives: the tensor that losses and metrics look at, and what its numbers mean."""

from typing import Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.program import inputs

aten = torch.ops.aten
Meaning = Literal["logits", "probabilities", "values"]
_LINEAR = (aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
_SHAPING = (
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.add.Tensor,
    aten.alias.default,
)


def output_shape(program: ExportedProgram) -> tuple[int | None, ...]:
    """Shape of the program's first output; `None` is a size that changes from call to call."""
    value = output_node(program).meta["val"]
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def output_node(program: ExportedProgram) -> torch.fx.Node:
    """The graph's node that computes the first tensor of the program's outputs."""
    names = program.graph_signature.user_outputs
    nodes: dict[str, torch.fx.Node] = {node.name: node for node in program.graph.nodes}
    for name in names:
        node = nodes.get(name) if isinstance(name, str) else None
        if node is not None and isinstance(node.meta.get("val"), Tensor):
            return node
    raise DataMismatchError("the program gives no tensor; export a model whose first output is a tensor")


def first_output(outputs: object) -> Tensor:
    """The first tensor of what a module returned, a tensor, a tuple, a dict: losses and metrics look at that one."""
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            return leaf
    raise DataMismatchError("the program gives no tensor; export a model whose first output is a tensor")


def meaning(program: ExportedProgram) -> Meaning:
    """What the outputs are taken for where no target says it.

    Outputs that end in a softmax are class probabilities. Outputs of a linear layer with two columns or more, one row a
    sample or one a token, are class scores, unless they have as many columns as an input (an autoencoder). All else is
    values.
    """
    node = output_node(program)
    shape = output_shape(program)
    while node.target in _SHAPING and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    if node.target in _SOFTMAX:
        return "probabilities"
    if node.target in _LOG_SOFTMAX:
        return "logits"
    columns = shape[-1] if shape else None
    widths = {item.shape[-1] for item in inputs(program) if item.dtype.is_floating_point and item.shape}
    scores = node.target in _LINEAR and len(shape) in (2, 3) and columns is not None and columns > 1
    return "logits" if scores and columns not in widths else "values"
