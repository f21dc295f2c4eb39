"""The operators that turn a bit stream, scales and zero points back into a weight, and how they are found again."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fleetpress.compression.quantization import sparse_nodes, trits
from fleetpress.compression.quantization.packing import packed_bytes
from fleetpress.compression.quantization.sparse_weight import SparseFloats, SparseWeight
from fleetpress.compression.quantization.values import compute_dtype
from fleetpress.compression.quantization.weight import QuantizedWeight, moved_shape, packs_zero_points
from fleetpress.compression.scheme import QuantScheme

aten = torch.ops.aten

# Names of what is stored for a weight behind its own.
PACKED, SCALE, ZERO_POINT, CODEBOOK = "_packed", "_scale", "_zero_point", "_codebook"
MASK, VALUES = "_mask", "_values"  # of what is not zero

# The last operator of every unpacked weight: it copies only what `movedim` left in another order.
END = aten.contiguous.default


class UnpackNodes:
    """Adds the operators of unpacked weights to one graph; weights come in the order of their first use.

    They stand right before that use, so only the weights in use are in memory as floats.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._places: dict[int, tuple[fx.Node, ...]] = {}
        self._tables: dict[tuple[object, ...], fx.Node] = {}
        self._in_bytes: dict[int, fx.Node] = {}

    def add(self, weight: QuantizedWeight, buffers: Mapping[str, fx.Node], first_use: fx.Node) -> fx.Node:
        """The node that holds the weight, computed in front of `first_use` from the placeholders of its `buffers`.

        These are named by what they hold: `PACKED`, `SCALE`, `ZERO_POINT`, `CODEBOOK`, `MASK`.
        """
        rows, columns = weight.codes.shape
        scheme, size = weight.scheme, weight.group_size
        padded = rows, columns
        with self._graph.inserting_before(first_use):
            is_int, bits = scheme.type == "int", None
            count = int(weight.nonzero.sum()) if isinstance(weight, SparseWeight) else rows * columns
            if is_int:
                value = self._codes(buffers[PACKED], count, scheme.num_bits)
            else:
                value = self._looked_up(weight, buffers, count)
            if isinstance(weight, SparseWeight):
                bits = self._flat(self._codes(buffers[MASK], rows * columns, 1))
                value = sparse_nodes.spread(
                    self._call, bits, self._flat(value), scheme.middle if is_int else 0
                )
            if size is not None and columns % size:
                padded = rows, columns + -columns % size
                value = self._call(aten.reshape.default, value, [rows, columns])
                value = self._call(aten.constant_pad_nd.default, value, [0, -columns % size])
            value = self._call(aten.reshape.default, value, scale_view(padded, size))
            if scheme.type == "int":
                value = self._call(aten.to.dtype, value, weight.dtype)
                if ZERO_POINT in buffers:
                    zero = self._zero_points(buffers[ZERO_POINT], weight)
                    value = self._call(aten.sub.Tensor, value, zero)
                else:
                    value = self._call(aten.sub.Scalar, value, scheme.middle)
                value = self._call(aten.mul.Tensor, value, buffers[SCALE])
            else:
                value = self._scaled(value, weight, buffers)
            if padded[1] != columns:
                value = self._call(aten.reshape.default, value, list(padded))
                value = self._call(aten.slice.Tensor, value, 1, 0, columns)
            if bits is not None and ZERO_POINT in buffers:
                value = self._call(aten.reshape.default, value, [rows, columns])
                value = sparse_nodes.zeroed(self._call, bits, value, [rows, columns])
            value = self._call(aten.reshape.default, value, list(moved_shape(weight.shape, weight.axis)))
            if weight.axis:
                value = self._call(aten.movedim.int, value, 0, weight.axis)
            return self._call(END, value)

    def add_floats(self, weight: SparseFloats, buffers: Mapping[str, fx.Node], first_use: fx.Node) -> fx.Node:
        """As `add`, of a sparse weight that is not quantized: from `VALUES` and `MASK`."""
        with self._graph.inserting_before(first_use):
            bits = self._flat(self._codes(buffers[MASK], math.prod(weight.shape), 1))
            value = sparse_nodes.spread(self._call, bits, buffers[VALUES], 0)
            return self._call(END, self._call(aten.reshape.default, value, list(weight.shape)))

    def _flat(self, value: fx.Node) -> fx.Node:
        return self._call(aten.reshape.default, value, [-1])

    def _looked_up(self, weight: QuantizedWeight, buffers: Mapping[str, fx.Node], count: int) -> fx.Node:
        """So many codebook entries (numbers that FP8 codes are), in the dtype of the arithmetic, of any shape.

        A table tells what the codes in every possible byte mean, so that bytes are looked up and never taken apart.
        That is 2 to 15 times faster than shifting codes out (measured). Codes over two bytes have no such table.
        """
        scheme, dtype = weight.scheme, compute_dtype(weight.dtype)
        packed = buffers[PACKED]
        if scheme.type == "codebook" and 8 % scheme.num_bits:
            codes = self._call(aten.reshape.default, self._codes(packed, count, scheme.num_bits), [-1])
            codes = self._call(aten.to.dtype, codes, torch.int32)
            return self._call(aten.index_select.default, buffers[CODEBOOK], 0, codes)
        table = self._table(scheme, dtype, packed, buffers.get(CODEBOOK))
        in_byte = trits.IN_BYTE if scheme.codebook == "ternary" else 8 // scheme.num_bits
        at = self._call(aten.to.dtype, packed, torch.int32)
        if (in_byte, dtype) == (2, torch.float32):
            # Two floats move as one of twice the size: torch copies single elements faster than short rows.
            table = self._call(aten.view.dtype, table, torch.float64)
            pairs = self._call(
                aten.index_select.default, self._call(aten.reshape.default, table, [-1]), 0, at
            )
            value = self._call(aten.view.dtype, pairs, torch.float32)
        else:
            value = self._call(aten.index_select.default, table, 0, at)
        if count % in_byte:
            value = self._call(aten.reshape.default, value, [-1])
            value = self._call(aten.slice.Tensor, value, 0, 0, count)
        return value

    def _table(
        self, scheme: QuantScheme, dtype: torch.dtype, packed: fx.Node, codebook: fx.Node | None
    ) -> fx.Node:
        """What the codes of all bytes mean, [bytes, codes in a byte]; without a stored codebook once for the graph."""
        key = (scheme.type, scheme.codebook, scheme.num_bits, dtype)
        if codebook is None and key in self._tables:
            return self._tables[key]
        if scheme.codebook == "ternary":
            powers = self._call(aten.unsqueeze.default, self._ones(packed, trits.IN_BYTE, 3), 0)
            powers = self._call(aten.cumprod.default, powers, 1)
            powers = self._call(aten.div.Scalar_mode, powers, 3, rounding_mode="floor")
            number = self._call(aten.unsqueeze.default, self._numbers(packed, trits.BYTES), 1)
            digits = self._call(aten.div.Tensor_mode, number, powers, rounding_mode="floor")
            digits = self._call(aten.remainder.Scalar, digits, 3)
            table = self._call(aten.to.dtype, self._call(aten.sub.Scalar, digits, 1), dtype)
        elif scheme.type == "float":
            bytes_ = self._call(aten.view.dtype, self._every_byte(packed), torch.float8_e4m3fn)
            table = self._call(aten.to.dtype, bytes_, dtype)
        elif scheme.codebook == "binary":
            codes = self._call(aten.to.dtype, self._codes(self._every_byte(packed), 256 * 8, 1), dtype)
            table = self._call(aten.sub.Scalar, self._call(aten.mul.Scalar, codes, 2), 1)
        else:
            assert codebook is not None
            in_byte = 8 // scheme.num_bits
            codes = self._byte_codes(packed, scheme.num_bits)
            table = self._call(aten.index_select.default, codebook, 0, codes)
            return self._call(aten.reshape.default, table, [256] if in_byte == 1 else [256, in_byte])
        self._tables[key] = table
        return table

    def _scaled(self, value: fx.Node, weight: QuantizedWeight, buffers: Mapping[str, fx.Node]) -> fx.Node:
        """Looked up values, under the shape that meets the scales, times these, in the weight's dtype."""
        dtype = compute_dtype(weight.dtype)
        if SCALE in buffers:
            scale = buffers[SCALE]
            if weight.scale.dtype == torch.uint8:
                scale = self._call(aten.view.dtype, scale, torch.float8_e8m0fnu)
                scale = self._call(aten.to.dtype, scale, torch.float32)
            if weight.scale.dtype != dtype and (weight.scale.dtype, dtype) != (torch.uint8, torch.float32):
                scale = self._call(aten.to.dtype, scale, dtype)
            value = self._call(aten.mul.Tensor, value, scale)
        return value if weight.dtype == dtype else self._call(aten.to.dtype, value, weight.dtype)

    def _byte_codes(self, like: fx.Node, num_bits: int) -> fx.Node:
        """The codes in the bytes 0 to 255, one after the other, int32; once for the whole graph."""
        if num_bits not in self._in_bytes:
            codes = self._codes(self._every_byte(like), 256 * 8 // num_bits, num_bits)
            codes = self._call(aten.reshape.default, codes, [-1])
            self._in_bytes[num_bits] = self._call(aten.to.dtype, codes, torch.int32)
        return self._in_bytes[num_bits]

    def _ones(self, like: fx.Node, count: int, value: int = 1) -> fx.Node:
        """So many equal whole numbers, computed from a stored tensor so that they are on the same device."""
        return self._call(aten.new_full.default, like, [count], value, dtype=torch.int64)

    def _every_byte(self, like: fx.Node) -> fx.Node:
        return self._call(aten.to.dtype, self._numbers(like, 256), torch.uint8)

    def _numbers(self, like: fx.Node, count: int) -> fx.Node:
        """0, 1, 2 ... `count` - 1."""
        return self._call(aten.sub.Scalar, self._call(aten.cumsum.default, self._ones(like, count), 0), 1)

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
    part: fx.Node, stored: Mapping[fx.Node, Tensor]
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The node of the weight that a scale, codebook or sparse values belong to, and the operators it is made by.

    None if there is no such weight.

    `stored` holds the placeholders that unpacked weights may come from.
    """
    end = part
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
    return end, tuple(node for node in part.graph.nodes if node in made_by)


def evaluate(nodes: tuple[fx.Node, ...], stored: Mapping[fx.Node, Tensor]) -> Tensor:
    """The value of the last of `nodes`."""
    values: dict[fx.Node, Tensor] = dict(stored)
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[nodes[-1]]
