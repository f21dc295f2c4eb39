"""The operators that turn a bit stream, scales and zero points back into a weight, and how they are found again."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fleetpress.compression.quantization import sparse_nodes
from fleetpress.compression.quantization.packing import packed_bytes
from fleetpress.compression.quantization.sparse_weight import SparseFloats, SparseWeight
from fleetpress.compression.quantization.weight import QuantizedWeight, moved_shape, packs_zero_points

aten = torch.ops.aten

# The last operator of every unpacked weight: it copies only what `movedim` left in another order.
END = aten.contiguous.default


class UnpackNodes:
    """Adds the operators of unpacked weights to one graph; weights come in the order of their first use.

    They stand right before that use, so only the weights in use are in memory as floats.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._places: dict[int, tuple[fx.Node, ...]] = {}

    def add(
        self,
        weight: QuantizedWeight,
        packed: fx.Node,
        scale: fx.Node,
        zero_point: fx.Node | None,
        first_use: fx.Node,
        *,
        mask: fx.Node | None = None,
    ) -> fx.Node:
        """The node that holds the weight, computed from the placeholders of its buffers in front of `first_use`."""
        rows, columns = weight.codes.shape
        scheme, size = weight.scheme, weight.group_size
        padded = rows, columns
        with self._graph.inserting_before(first_use):
            bits = None
            if isinstance(weight, SparseWeight) and mask is not None:
                bits = self._flat(mask, rows * columns, 1)
                stored = self._flat(packed, int(weight.nonzero.sum()), scheme.num_bits)
                value = sparse_nodes.spread(self._call, bits, stored, scheme.middle)
            else:
                value = self._codes(packed, rows * columns, scheme.num_bits)
            if size is not None and columns % size:
                padded = rows, columns + -columns % size
                value = self._call(aten.reshape.default, value, [rows, columns])
                value = self._call(aten.constant_pad_nd.default, value, [0, -columns % size])
            value = self._call(aten.reshape.default, value, scale_view(padded, size))
            value = self._call(aten.to.dtype, value, weight.dtype)
            if zero_point is None:
                value = self._call(aten.sub.Scalar, value, scheme.middle)
            else:
                value = self._call(aten.sub.Tensor, value, self._zero_points(zero_point, weight))
            value = self._call(aten.mul.Tensor, value, scale)
            if padded[1] != columns:
                value = self._call(aten.reshape.default, value, list(padded))
                value = self._call(aten.slice.Tensor, value, 1, 0, columns)
            if bits is not None and zero_point is not None:
                value = self._call(aten.reshape.default, value, [rows, columns])
                value = sparse_nodes.zeroed(self._call, bits, value, [rows, columns])
            value = self._call(aten.reshape.default, value, list(moved_shape(weight.shape, weight.axis)))
            if weight.axis:
                value = self._call(aten.movedim.int, value, 0, weight.axis)
            return self._call(END, value)

    def add_floats(self, weight: SparseFloats, values: fx.Node, mask: fx.Node, first_use: fx.Node) -> fx.Node:
        """As `add`, of a sparse weight that is not quantized."""
        with self._graph.inserting_before(first_use):
            bits = self._flat(mask, math.prod(weight.shape), 1)
            value = sparse_nodes.spread(self._call, bits, values, 0)
            return self._call(END, self._call(aten.reshape.default, value, list(weight.shape)))

    def _flat(self, packed: fx.Node, count: int, num_bits: int) -> fx.Node:
        return self._call(aten.reshape.default, self._codes(packed, count, num_bits), [-1])

    def _zero_points(self, zero_point: fx.Node, weight: QuantizedWeight) -> fx.Node:
        groups = weight.scale.numel()
        if packs_zero_points(groups, weight.scheme):
            zero_point = self._codes(zero_point, groups, weight.scheme.num_bits)
            zero_point = self._call(aten.reshape.default, zero_point, list(scale_shape(weight)))
        return self._call(aten.to.dtype, zero_point, weight.dtype)

    def _codes(self, packed: fx.Node, count: int, num_bits: int) -> fx.Node:
        """A node with `count` uint8 codes, of any shape."""
        if num_bits == 8:
            return packed
        mask = (1 << num_bits) - 1
        if 8 % num_bits == 0:
            parts = [self._call(aten.bitwise_and.Scalar, packed, mask)]
            for shift in range(num_bits, 8 - num_bits, num_bits):
                part = self._call(aten.bitwise_right_shift.Tensor_Scalar, packed, shift)
                parts.append(self._call(aten.bitwise_and.Scalar, part, mask))
            parts.append(self._call(aten.bitwise_right_shift.Tensor_Scalar, packed, 8 - num_bits))
            codes = self._call(aten.stack.default, parts, -1)
        else:
            low_byte, high_byte, down, up = self._places_of(num_bits, packed)
            size = packed_bytes(count, num_bits)
            if size % num_bits:
                packed = self._call(aten.constant_pad_nd.default, packed, [0, -size % num_bits])
            # One row a byte of eight codes: whole rows are picked and shifted, which is several times faster.
            stream = self._call(aten.t.default, self._call(aten.reshape.default, packed, [-1, num_bits]))
            low = self._call(aten.index_select.default, stream, 0, low_byte)
            low = self._call(aten.bitwise_right_shift.Tensor, low, down)
            high = self._call(aten.index_select.default, stream, 0, high_byte)
            high = self._call(aten.bitwise_left_shift.Tensor, high, up)
            codes = self._call(aten.bitwise_or.Tensor, low, high)
            codes = self._call(aten.t.default, self._call(aten.bitwise_and.Scalar, codes, mask))
        if count % (8 // num_bits if 8 % num_bits == 0 else 8):
            codes = self._call(aten.reshape.default, codes, [-1])
            codes = self._call(aten.slice.Tensor, codes, 0, 0, count)
        return codes

    def _places_of(self, num_bits: int, packed: fx.Node) -> tuple[fx.Node, ...]:
        """Where eight codes lie in `num_bits` bytes: first and last byte of each, and the shifts of both.

        One set a width for the whole graph. It is computed from a stored tensor so that it is on the same device.
        """
        if num_bits not in self._places:
            ends = self._call(aten.new_full.default, packed, [8], num_bits, dtype=torch.int64)
            ends = self._call(aten.cumsum.default, ends, 0)
            starts = self._call(aten.sub.Scalar, ends, num_bits)
            low_byte = self._call(aten.bitwise_right_shift.Tensor_Scalar, starts, 3)
            last_bits = self._call(aten.sub.Scalar, ends, 1)
            high_byte = self._call(aten.bitwise_right_shift.Tensor_Scalar, last_bits, 3)
            starts = self._call(aten.unsqueeze.default, starts, 1)
            down = self._call(aten.to.dtype, self._call(aten.bitwise_and.Scalar, starts, 7), torch.uint8)
            up = self._call(aten.rsub.Scalar, down, 8)
            self._places[num_bits] = (low_byte, high_byte, down, up)
        return self._places[num_bits]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._graph.call_function(target, args, kwargs)


def scale_view(padded: tuple[int, int], group_size: int | None) -> list[int]:
    """The shape under which codes [rows, columns] meet scales of `scale_shape`."""
    rows, columns = padded
    return [rows, columns] if group_size is None else [rows, columns // group_size, group_size]


def scale_shape(weight: QuantizedWeight) -> tuple[int, ...]:
    """The shape of stored scales and zero points: [rows, groups, 1], or [rows, 1] without groups."""
    return (*weight.scale.shape, 1) if weight.group_size is not None else tuple(weight.scale.shape)


def find_unpacked(
    scale: fx.Node, stored: Mapping[fx.Node, Tensor]
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The node of the weight that `scale` belongs to (of sparse floats: the values) and the operators it is made by.

    None if it is no such weight.

    `stored` holds the placeholders that unpacked weights may come from.
    """
    end = scale
    while end.target is not END:
        if len(end.users) != 1:
            return None
        end = next(iter(end.users))
        if end.op != "call_function":
            return None
    made_by: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            if node not in stored:
                return None
        elif node not in made_by:
            made_by.add(node)
            waiting.extend(node.all_input_nodes)
    return end, tuple(node for node in scale.graph.nodes if node in made_by)


def evaluate(nodes: tuple[fx.Node, ...], stored: Mapping[fx.Node, Tensor]) -> Tensor:
    """The value of the last of `nodes`."""
    values: dict[fx.Node, Tensor] = dict(stored)
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[nodes[-1]]
