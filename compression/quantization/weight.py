"""A quantized weight: its codes as rows of output units, and what turns them back into the tensor they came from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.errors import MethodError
from fleetpress.compression.quantization import affine, codebooks, float8, packing
from fleetpress.compression.quantization.trits import pack_trits
from fleetpress.compression.quantization.values import compute_dtype
from fleetpress.compression.scheme import DEFAULT_METHOD, CodeType, QuantScheme, rows_and_columns

# Unpacking packed zero points takes nodes in the graph: below this saving they stay one byte each.
_WORTH_PACKING_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """Codes [rows, columns], one row per output unit, for a weight of `shape` with its units along `axis`.

    Codes are uint8, or float8_e4m3fn if the scheme's type is float. `scale` [rows, groups] has the weight's dtype; that
    of MXFP4 is uint8, an exponent plus 127, and then `weight_dtype` is given. `zero_point` is uint8 of the same shape,
    None if symmetric. Strategy tensor has one of each, [1, 1]. The last group of a row is shorter if the size in
    `scheme` does not divide the row. A learned `codebook` [2^num_bits] ascends, in the dtype of the arithmetic
    (float32; float64 of float64 weights); without scales, `scale` is [1, 1], one, and not stored in programs. The
    layer's inputs, if they become integers, too, are `(code - input_zero_point) * input_scale`, codes -128 to 127.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme
    shape: tuple[int, ...]
    axis: int = 0
    codebook: Tensor | None = None
    weight_dtype: torch.dtype | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        return self.weight_dtype or self.scale.dtype

    @property
    def entries(self) -> Tensor | None:
        """The codebook, learned or fixed; None if codes are numbers."""
        fixed = self.codebook is None and self.scheme.type == "codebook"
        return codebooks.entries(self.scheme, self.dtype) if fixed else self.codebook

    @property
    def group_size(self) -> int | None:
        """Weights per scale, None per channel or tensor; at most a row."""
        size = self.scheme.group_size
        return None if size is None else min(size, self.codes.shape[1])

    def dequantize(self) -> Tensor:
        """The weight in its original shape and dtype, contiguous."""
        return from_rows(self._rows(slice(None)), self.shape, self.axis)

    def sqnr_db(self, weight: Tensor) -> float:
        """Signal to quantization noise against the original `weight`, in decibels; infinite without noise."""
        signal = noise = 0.0
        rows = to_rows(weight.detach(), self.axis)
        step = max(1, affine.TILE_ELEMENTS // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            at = slice(start, start + step)
            tile = self._rows(at).double()
            original = rows[at].double()
            signal += float(original.square().sum())
            noise += float((tile - original).square().sum())
        if noise == 0:
            return math.inf
        return 10 * math.log10(signal / noise) if signal else -math.inf

    def stored_bytes(self) -> int:
        """Bytes of codes, scales, zero points and codebook in a program."""
        return predicted_bytes(self.shape, self.axis, self.scheme, self.dtype)

    def _rows(self, at: slice) -> Tensor:
        """Dequantized rows."""
        scales = at if self.scale.shape[0] == self.codes.shape[0] else slice(None)
        zero = None if self.zero_point is None else self.zero_point[scales]
        codebook = self.entries
        if codebook is None:
            return decoded(self.codes[at], self.scale[scales], zero, self.scheme)
        scale = self.scale[scales] if self.scheme.has_scale else None
        return codebooks.dequantize(self.codes[at], scale, codebook, self.scheme, self.dtype)


def parameters(rows: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that hold the whole range of `rows` [rows, columns], both [rows, groups].

    For strategy tensor they depend on the smallest and the largest weight alone. Raises QuantizationError for NaN,
    infinite or overflowing weights and for dtypes that are no floating point, MethodError for a learned codebook.
    """
    if scheme.type == "codebook":
        codebooks.entries(scheme, rows.dtype)
        return codebooks.scales(rows, scheme), None
    if scheme.type == "int":
        return affine.quantization_parameters(rows, scheme)
    biggest = float8.largest(rows)
    if scheme.strategy == "tensor":
        biggest = biggest.amax().view(1, 1)
    return float8.scales(biggest, rows.dtype), None


def encoded(rows: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> QuantizedWeight:
    """`rows` [rows, columns] under the given scales and zero points, rounded to the nearest codes."""
    if scheme.type == "codebook":
        codes = codebooks.quantize(rows, scale, codebooks.entries(scheme, rows.dtype), scheme)
    elif scheme.type == "int":
        codes = affine.quantize(rows, scale, zero_point, scheme)
    else:
        codes = float8.quantize(rows, scale)
    return QuantizedWeight(
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        scheme=scheme,
        shape=tuple(rows.shape),
        weight_dtype=rows.dtype if scale.dtype != rows.dtype else None,
    )


def decoded(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """The weight [rows, columns] that codes of type int or float mean, in the scales' dtype."""
    if scheme.type == "int":
        return affine.dequantize(codes, scale, zero_point, scheme)
    return float8.dequantize(codes, scale)


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows that were quantized apart, one below the other."""
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    codes = torch.cat([part.codes for part in parts])
    return replace(
        parts[0],
        codes=codes,
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        shape=tuple(codes.shape),
    )


def predicted_bytes(shape: tuple[int, ...], axis: int, scheme: QuantScheme, dtype: torch.dtype) -> int:
    """Bytes of codes, scales, zero points and codebook of a weight in a program, from its shape alone."""
    rows, columns = rows_and_columns(shape, axis)
    groups = math.prod(scheme.groups(rows, columns))
    size = scheme.code_bytes(rows * columns) + scheme.codebook_entries * compute_dtype(dtype).itemsize
    if scheme.has_scale:
        size += groups * scheme.scale_bits(8 * dtype.itemsize) // 8
    if scheme.activation_bits:
        size += groups * 4
    if scheme.symmetric:
        return size
    return size + (
        packing.packed_bytes(groups, scheme.num_bits) if packs_zero_points(groups, scheme) else groups
    )


def pack_codes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """The stream that a program stores of codes, uint8 of `scheme.code_bytes(codes.numel())`."""
    if scheme.codebook == "ternary":
        return pack_trits(codes)
    return packing.pack(codes.view(torch.uint8), scheme.num_bits)


def packs_zero_points(groups: int, scheme: QuantScheme) -> bool:
    """Whether a program stores so many zero points as a bit stream rather than a byte each."""
    return groups - packing.packed_bytes(groups, scheme.num_bits) >= _WORTH_PACKING_BYTES


def to_rows(weight: Tensor, axis: int) -> Tensor:
    """The weight as [output units, entries of a unit]; a view where memory order allows it."""
    rows, columns = rows_and_columns(weight.shape, axis)
    return weight.movedim(axis, 0).reshape(rows, columns)


def from_rows(rows: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The opposite of `to_rows`, contiguous."""
    return rows.reshape(moved_shape(shape, axis)).movedim(0, axis).contiguous()


def moved_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """`shape` with the size of `axis` in front."""
    return shape[axis], *shape[:axis], *shape[axis + 1 :]


class QuantizeRows(Protocol):
    """Codes of `rows` [output units, entries]; `statistics` are those of the weight, for methods that need them."""

    def __call__(
        self, rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None
    ) -> QuantizedWeight:
        """The rows under the scheme. Raises QuantizationError for bad values."""
        ...


@dataclass(frozen=True, kw_only=True)
class QuantizeMethod:
    """How rows become codes; the paper or document it comes from, and one line on it.

    One that `needs_inputs` is always given the statistics of what the weight is multiplied with. `types` are those of
    the codes it makes; one that `learns_codebook` makes codebooks, all others take fixed ones.
    """

    name: str
    quantize: QuantizeRows
    paper: str
    summary: str
    needs_inputs: bool = False
    types: tuple[CodeType, ...] = ("int",)
    learns_codebook: bool = False


def check_method(method: QuantizeMethod, scheme: QuantScheme) -> None:
    """Raises MethodError for a scheme whose codes the method does not make."""
    if scheme.type not in method.types:
        kinds = {"int": "integer codes", "float": "FP8", "codebook": "codebooks"}
        can = " or ".join(kinds[kind] for kind in method.types)
        raise MethodError(
            f"{method.name} makes {can}, not {kinds[scheme.type]}; take method {DEFAULT_METHOD}"
        )
    if scheme.type == "codebook" and method.learns_codebook != (scheme.codebook == "learned"):
        what = "learns its own codebook" if method.learns_codebook else "takes fixed codebooks only"
        raise MethodError(f"{method.name} {what}, but the scheme has a {scheme.codebook} one")
