"""Which layers of a program gain from integer kernels, told from its graph alone, so that a plan knows it, too."""

import math

import torch
from torch import fx
from torch.export import ExportedProgram

from fleetpress.compression.arguments import arguments
from fleetpress.compression.convolutions import each
from fleetpress.compression.layers import LAYER_OPS, LayerOp
from fleetpress.compression.program import STORED, aliases, inputs, tensors
from fleetpress.compression.selection import Layer

KERNEL_DIMS = {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_COLUMNS = (1 << 31) // (128 * 128) - 1  # sums of products stay below 2^31
_FREE_SIZE = 32  # what a free size other than the batch counts as; the batch is 1
# What a layer takes, fitted to 20 shapes on one core with 8-bit dot products (AVX-512 VNNI), torch 2.13: multiply-adds
# per nanosecond in float and in integers, and nanoseconds for every number that is rounded, gathered or scaled.
_FLOAT_RATE, _INTEGER_RATE = 43, 200
_ROUND, _GATHER, _SCALE = 0.3, 0.3, 1.0
_CALLS = {
    True: 30_000,
    False: 25_000,
}  # nanoseconds of the calls around the product, of convolutions and others


class IntegerLayers:
    """Looks at the layers of one program."""

    def __init__(self, program: ExportedProgram) -> None:
        tied = aliases(tensors(program))
        self._tied = {*tied, *tied.values()}
        by_name = {node.name: node for node in program.graph.nodes}
        self._nodes: dict[str, fx.Node] = by_name
        self._stored = {
            spec.target: by_name[spec.arg.name]
            for spec in program.graph_signature.input_specs
            if spec.kind in STORED and spec.target is not None
        }
        self._batch = {
            symbol
            for item in inputs(program)
            for size in by_name[item.name].meta["val"].shape[:1]
            if isinstance(size, torch.SymInt)
            for symbol in size.node.expr.free_symbols
        }

    def reason_against(self, layer: Layer) -> str | None:
        """Why the layer's inputs stay floats, if they do: it cannot run on integer kernels, or would not gain."""
        if layer.kind not in KERNEL_DIMS:
            return f"a {layer.kind} layer has no integer kernel"
        (name,) = layer.weights
        weight = self._stored[name]
        if name in self._tied or any(user.name not in layer.nodes for user in weight.users):
            return "its weight is used elsewhere, too"
        if weight.meta["val"].dtype not in _DTYPES:
            return f"weights of {str(weight.meta['val'].dtype).removeprefix('torch.')} have no integer kernel"
        floats = integers = 0.0
        for node in (self._nodes[one] for one in layer.nodes):
            op = LAYER_OPS[node.target]  # type: ignore[index]
            reason = _cannot(node, op)
            if reason is not None:
                return reason
            one, other = self._costs(node, op)
            floats, integers = floats + one, integers + other
        if integers >= floats:
            return "it is too small to gain from an integer kernel"
        return None

    def _costs(self, node: fx.Node, op: LayerOp) -> tuple[float, float]:
        """Nanoseconds of one call for one sample, in float and in integers, about."""
        read, made = self._sizes(read_by(node, op)), self._sizes(node)
        weight = node.args[op.weight].meta["val"]  # type: ignore[union-attr]
        columns = math.prod(weight.shape) // weight.shape[op.axis]
        convolves = KERNEL_DIMS[op.kind] > 0
        positions = math.prod(made) // weight.shape[op.axis]
        products = positions * math.prod(weight.shape)
        around = _ROUND * math.prod(read) + _SCALE * math.prod(made) + _CALLS[convolves]
        if convolves:
            around += _GATHER * positions * columns
        return products / _FLOAT_RATE, products / _INTEGER_RATE + around

    def _sizes(self, node: fx.Node) -> list[int]:
        found = []
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                expression = size.node.expr
                values = {
                    symbol: 1 if symbol in self._batch else _FREE_SIZE for symbol in expression.free_symbols
                }
                found.append(max(1, int(expression.subs(values))))
            else:
                found.append(size)
        return found


def read_by(node: fx.Node, op: LayerOp) -> fx.Node:
    """What the operator multiplies with its weight."""
    found = node.args[op.input]
    assert isinstance(found, fx.Node)
    return found


def _cannot(node: fx.Node, op: LayerOp) -> str | None:
    dims = KERNEL_DIMS[op.kind]
    given = read_by(node, op).meta["val"]
    weight = node.args[op.weight].meta["val"]  # type: ignore[union-attr]
    columns = weight.numel() // weight.shape[op.axis]
    if columns == 1:
        return "torch's integer product of a single column is wrong (2.13)"
    if columns > _MOST_COLUMNS:
        return f"sums over more than {_MOST_COLUMNS} products of integers may overflow"
    if dims == 0:
        usual = given.dim() >= 2 and not node.kwargs and weight.dim() == 2
        return None if usual else "its product is of an unusual form"
    told = arguments(node)
    if int(told["groups"]) != 1:
        return "a convolution with groups has no integer kernel"
    usual = given.dim() == dims + 2 and all(step == 1 for step in each(told["dilation"], dims))
    return None if usual else "its convolution is of an unusual form"
