"""Layers on integer kernels: 8-bit inputs times 8-bit weights, summed in 32 bits, then one scale and shift a unit.

Plain ATen operators, so that `torch.export.load` alone runs them: `_int_mm` is oneDNN's product where the processor has
8-bit dot products. With input codes q, zero point z and scale s, weight codes w and scales t of a unit:
`output = (sum(q * w) - z * sum(w)) * s * t + bias`. The product is exact; `z * sum(w) * s * t` is stored as `_offset`.
A convolution gathers its patches as bytes, channels last, so that whole runs of them are copied. It stores its weight
[units, kernel..., channels] for that; everything else keeps the weight's own shape.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fleetpress.compression.arguments import arguments
from fleetpress.compression.convolutions import each, sides
from fleetpress.compression.layers import LAYER_OPS, LayerOp
from fleetpress.compression.quantization.activations import HIGHEST, LOWEST
from fleetpress.compression.quantization.integer_layers import KERNEL_DIMS, read_by
from fleetpress.compression.quantization.unpack_nodes import END, SCALE
from fleetpress.compression.quantization.weight import QuantizedWeight, from_rows

aten = torch.ops.aten

INTEGERS, OFFSET = "_int8", "_offset"  # names of what is stored, behind the weight's own and beside its scale


def integer_buffers(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What a program stores instead of the weight `name`."""
    signed = (weight.codes.to(torch.int16) - weight.scheme.middle).to(torch.int8)
    scale = weight.scale.reshape(-1)
    assert weight.input_scale is not None
    assert weight.input_zero_point is not None
    offset = signed.sum(1).double() * scale.double() * (weight.input_zero_point * weight.input_scale)
    codes = from_rows(signed, weight.shape, weight.axis)
    if codes.dim() > 2:
        codes = codes.movedim(1, -1).flatten(1).contiguous()
    return {name + INTEGERS: codes, name + SCALE: scale, name + OFFSET: offset.float()}


class IntegerNodes:
    """Puts layers of one graph on integer kernels. What several of them read is rounded once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._rounded: dict[tuple[fx.Node, float, int], fx.Node] = {}

    def replace(self, weight: QuantizedWeight, buffers: Mapping[str, fx.Node], old: fx.Node) -> None:
        """In place of every operator that uses the weight `old`, compute with its `buffers`, by their suffixes."""
        for node in list(old.users):
            op = LAYER_OPS[node.target]  # type: ignore[index]
            codes = self._input(read_by(node, op), weight)
            with self._graph.inserting_before(node):
                build = self._convolution if KERNEL_DIMS[op.kind] else self._product
                result = build(node, op, codes, weight, buffers)
            result.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(result)
            self._graph.erase_node(node)
            result.name = node.name  # the signature names outputs

    def _input(self, x: fx.Node, weight: QuantizedWeight) -> fx.Node:
        """The codes of an input, computed right behind it."""
        assert weight.input_scale is not None
        assert weight.input_zero_point is not None
        key = (x, weight.input_scale, weight.input_zero_point)
        if key not in self._rounded:
            behind = x.next
            while behind.op == "placeholder":
                behind = behind.next
            with self._graph.inserting_before(behind):
                value = x
                if x.meta["val"].dtype != torch.float32:
                    value = self._call(aten.to.dtype, value, torch.float32)
                # zero_point - (-1 / scale) * x, in one pass
                value = self._call(
                    aten.rsub.Scalar, value, weight.input_zero_point, -1.0 / weight.input_scale
                )
                value = self._call(aten.clamp.default, self._call(aten.round.default, value), LOWEST, HIGHEST)
                self._rounded[key] = self._call(aten.to.dtype, value, torch.int8)
        return self._rounded[key]

    def _product(
        self,
        node: fx.Node,
        op: LayerOp,
        codes: fx.Node,
        weight: QuantizedWeight,
        buffers: Mapping[str, fx.Node],
    ) -> fx.Node:
        x = read_by(node, op)
        shape = x.meta["val"].shape
        rows = codes
        if len(shape) != 2:
            rows = self._call(aten.reshape.default, codes, [-1, weight.codes.shape[1]])
        stored = buffers[INTEGERS]
        sums = self._call(
            aten._int_mm.default, rows, stored if op.axis else self._call(aten.t.default, stored)
        )
        value = self._scaled(sums, node, op, weight, buffers)
        if len(shape) != 2:
            sizes = [self._size(x, dim) for dim in range(len(shape) - 1)]
            value = self._call(aten.reshape.default, value, [*sizes, weight.codes.shape[0]])
        return self._call(END, value)

    def _convolution(
        self,
        node: fx.Node,
        op: LayerOp,
        codes: fx.Node,
        weight: QuantizedWeight,
        buffers: Mapping[str, fx.Node],
    ) -> fx.Node:
        dims = KERNEL_DIMS[op.kind]
        kernel, stride = weight.shape[2:], each(arguments(node)["stride"], dims)
        padding = sides(node, kernel)
        value = self._call(aten.permute.default, codes, [0, *range(2, dims + 2), 1])
        value = self._call(aten.contiguous.default, value)
        if any(padding) and any(side for pair in padding for side in pair):
            amounts = [0, 0, *(side for pair in reversed(padding) for side in pair)]
            value = self._call(aten.constant_pad_nd.default, value, amounts, weight.input_zero_point)
        for dim in range(dims):
            value = self._call(aten.unfold.default, value, dim + 1, kernel[dim], stride[dim])
        places = [self._size(value, dim, node.meta["val"].shape[dim + 1]) for dim in range(1, dims + 1)]
        # Behind the places stand the channels and then the kernel's dimensions.
        order = [*range(dims + 1), *range(dims + 2, 2 * dims + 2), dims + 1]
        value = self._call(aten.permute.default, value, order)
        # Patches overlap in memory, which a matrix of the product must not.
        value = self._call(aten.contiguous.default, value)
        patches = self._call(aten.reshape.default, value, [-1, weight.codes.shape[1]])
        sums = self._call(aten._int_mm.default, buffers[INTEGERS], self._call(aten.t.default, patches))
        value = self._scaled(sums, node, op, weight, buffers)
        batch = self._size(read_by(node, op), 0)
        value = self._call(aten.reshape.default, value, [weight.shape[0], batch, *places])
        return self._call(END, self._call(aten.transpose.int, value, 0, 1))

    def _scaled(
        self,
        sums: fx.Node,
        node: fx.Node,
        op: LayerOp,
        weight: QuantizedWeight,
        buffers: Mapping[str, fx.Node],
    ) -> fx.Node:
        """Sums of integers as the layer's outputs; of convolutions one row a unit."""
        bias = node.args[op.bias] if op.bias is not None and len(node.args) > op.bias else None
        factor, shift = buffers[SCALE], buffers[OFFSET]
        if weight.dtype != torch.float32:
            factor = self._call(aten.to.dtype, factor, torch.float32)
            bias = self._call(aten.to.dtype, bias, torch.float32) if isinstance(bias, fx.Node) else None
        factor = self._call(aten.mul.Scalar, factor, weight.input_scale)
        shift = (
            self._call(aten.neg.default, shift) if bias is None else self._call(aten.sub.Tensor, bias, shift)
        )
        if KERNEL_DIMS[op.kind]:
            factor, shift = (self._call(aten.unsqueeze.default, one, 1) for one in (factor, shift))
        value = self._call(
            aten.addcmul.default, shift, self._call(aten.to.dtype, sums, torch.float32), factor
        )
        return value if weight.dtype == torch.float32 else self._call(aten.to.dtype, value, weight.dtype)

    def _size(self, value: fx.Node, dim: int, known: object = None) -> Any:
        """A size as a number, or as the node that tells it."""
        size = value.meta["val"].shape[dim] if known is None else known
        return size if isinstance(size, int) else self._call(aten.sym_size.int, value, dim)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._graph.call_function(target, args, kwargs)
