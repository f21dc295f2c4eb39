"""What a program costs: parameters, and multiply-accumulate operations of one call."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fleetpress.compression.batches import TARGETS, Arrays
from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors, trainable

aten = torch.ops.aten


def parameters(program: ExportedProgram) -> int:
    """Number of floating-point parameters; tied ones count once."""
    names = trainable(program)
    values = {name: program.state_dict[name] for name in names}
    tied = aliases(values)
    return sum(value.numel() for name, value in values.items() if name not in tied)


def stored_bytes(program: ExportedProgram) -> int:
    """Bytes of all stored tensors in memory; tied ones count once."""
    values = tensors(program)
    tied = aliases(values)
    return sum(value.numel() * value.element_size() for name, value in values.items() if name not in tied)


def macs(program: ExportedProgram, batch: int = 1) -> int:
    """Multiply-accumulates of convolutions, products, attention and recurrent layers in one call.

    Sizes that are free are taken as `batch`; a program of a fixed batch size is counted as it is. Additions, norms and
    activations are left out, as is usual; floating-point operations are twice the number.
    """
    return sum(_by_node(program, batch).values())


def layer_macs(program: ExportedProgram, batch: int = 1) -> dict[str, int]:
    """The same of every layer alone, by its name. What multiplies no weights, as attention does, is in none of them."""
    counts = _by_node(program, batch)
    return {layer.name: sum(counts.get(node, 0) for node in layer.nodes) for layer in layers(program)}


def _by_node(program: ExportedProgram, batch: int) -> dict[str, int]:
    return {
        node.name: _COUNTS[node.target](node, batch)
        for node in program.graph.nodes
        if node.op == "call_function" and node.target in _COUNTS
    }


def sample_macs(program: ExportedProgram, arrays: Arrays) -> int:
    """About the multiply-accumulates of one sample of these arrays, 1 at least.

    Of a program with further free sizes beside the batch (tokens, steps) as many times those of one as the longest
    array has entries along its second dim.
    """
    known = {
        symbol
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
        for size in node.meta["val"].shape
        if not isinstance(size, int)
        for symbol in size.node.expr.free_symbols
    }
    lengths = [value.shape[1] for name, value in arrays.items() if name != TARGETS and value.dim() > 1]
    return max(1, macs(program) * (max(lengths, default=1) if len(known) > 1 else 1))


def _shape(value: Any, batch: int) -> list[int]:
    """Sizes as numbers, every symbol replaced by `batch`."""
    tensor = value.meta["val"] if isinstance(value, fx.Node) else value
    assert isinstance(tensor, Tensor)
    return [size if isinstance(size, int) else _number(size, batch) for size in tensor.shape]


def _number(size: torch.SymInt, batch: int) -> int:
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def _linear(node: fx.Node, batch: int) -> int:
    return math.prod(_shape(node, batch)) * _shape(node.args[1], batch)[-1]


def _product(left: int) -> Callable[[fx.Node, int], int]:
    def count(node: fx.Node, batch: int) -> int:
        return math.prod(_shape(node, batch)) * _shape(node.args[left], batch)[-1]

    return count


def _convolution(node: fx.Node, batch: int) -> int:
    return math.prod(_shape(node, batch)) * math.prod(_shape(node.args[1], batch)[1:])


def _transposed_convolution(node: fx.Node, batch: int) -> int:
    return math.prod(_shape(node.args[0], batch)) * math.prod(_shape(node.args[1], batch)[1:])


def _attention(node: fx.Node, batch: int) -> int:
    """Scores and their product with the values; a causal mask saves nothing, as is usual in such counts."""
    query, key, value = (_shape(item, batch) for item in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(node: fx.Node, batch: int) -> int:
    """Every step multiplies with every weight matrix once."""
    steps = math.prod(_shape(node.meta["val"][0], batch)[:-1])
    weights = [item for item in node.args[2] if item.meta["val"].dim() == 2]  # type: ignore[union-attr]
    return steps * sum(math.prod(_shape(item, batch)) for item in weights)


def _einsum(node: fx.Node, batch: int) -> int:
    """One multiplication for every combination of the letters; a third operand is counted as another product."""
    terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    operands = [_shape(item, batch) for item in node.args[1]]  # type: ignore[union-attr]
    if "." in "".join(terms) or len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, operands, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values()) * (len(terms) - 1)


_COUNTS: dict[Any, Callable[[fx.Node, int], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _product(0),
    aten.mm.default: _product(0),
    aten._int_mm.default: _product(0),
    aten.bmm.default: _product(0),
    aten.mv.default: _product(0),
    aten.addmm.default: _product(1),
    aten.baddbmm.default: _product(1),
    aten.conv1d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv3d.padding: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.rnn_relu.input: _recurrent,
    aten.einsum.default: _einsum,
}
