"""FP8 as a storage format: codes are 8-bit floats (e4m3: no infinity, at most 448), `weight ~ code * scale`.

The formulas are those of compressed-tensors (quantization/utils/helpers.py, lifecycle/forward_helpers.py) for weights
of type float: scales are max|w| / 448, codes are weight / scale clamped to +-448 and rounded half to even. Arithmetic
is in float32, for float64 weights in float64, and codes belong to the scale as it is stored, in the weight's own dtype.
So scales and codes of float32 and float64 weights are that library's. Half-precision weights have its scales, but codes
rounded once, from float32: the library divides in the weight's dtype first and so rounds twice (about 3 % of the codes
of bfloat16 weights come out a step apart, 0.4 % of float16). Rows of float16 weights below 0.007 get scales that are
rounded up, as in `affine`: float16 has few digits there, and what the library stores cuts off the largest weights.

Error bound: |weight - dequantized| <= |weight| / 16, or scale / 1024 for weights below scale / 64; a scale that was
rounded down by a relative error u of its dtype clips the largest weights by as much.

Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization.values import check_dtype, check_values, compute_dtype

LARGEST = 448.0
_TILE_ELEMENTS = 1 << 18


def largest(rows: Tensor) -> Tensor:
    """The largest magnitude of every row of `rows` [rows, columns], [rows, 1] in the dtype of the arithmetic.

    Raises QuantizationError for NaN, infinite or overflowing weights and for dtypes that are no floating point.
    """
    check_dtype(rows)
    biggest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
    check_values(rows, biggest)
    return biggest.to(compute_dtype(rows.dtype))


def scales(biggest: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales, in the weight's `dtype`, for the largest magnitudes that `largest` gives, of the same shape.

    One for a whole tensor is that of the largest of all its rows. Magnitude 0 gets the dtype's epsilon.
    """
    ideal = biggest / LARGEST
    if dtype == torch.float16:
        ideal = torch.where(ideal < 2.0**-16, (ideal * 2.0**24).ceil() / 2.0**24, ideal)
    scale = ideal.to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def quantize(rows: Tensor, scale: Tensor) -> Tensor:
    """Codes float8_e4m3fn [rows, columns] of `rows` for the given scales [rows, 1], or [1, 1] for all rows."""
    check_dtype(rows)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    scale = scale.to(compute_dtype(rows.dtype))
    buffer = torch.empty(_tile_rows(rows), rows.shape[1], dtype=scale.dtype)
    for at in _tiles(rows):
        work = buffer[: at.stop - at.start]
        work.copy_(rows[at]).div_(_of(scale, at)).clamp_(-LARGEST, LARGEST)
        codes[at] = work
    return codes


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight [rows, columns] in the scales' dtype: `code * scale`, rounded once.

    Raises QuantizationError for codes that mean NaN: `quantize` gives none.
    """
    weight = torch.empty(codes.shape, dtype=scale.dtype)
    for at, values in _values(codes, compute_dtype(scale.dtype)):
        weight[at] = values.mul_(_of(scale, at))
    return weight


def _values(codes: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Tile by tile the rows and their codes as numbers of `dtype`, in a buffer that the next tile overwrites."""
    shape = _tile_rows(codes), codes.shape[1]
    bits, buffer = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=dtype)
    for at in _tiles(codes):
        work, values = bits[: at.stop - at.start], buffer[: at.stop - at.start]
        # torch reads this dtype one by one. As float16 the same bits, a sign and seven more, mean 2^-8 of their value.
        work.copy_(codes[at].view(torch.int8))
        work.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        values.copy_(work.view(torch.float16)).mul_(2.0**8)
        # What would be 480 is NaN by definition.
        low, high = torch.aminmax(values)
        if float(torch.maximum(high, -low)) > LARGEST:
            raise QuantizationError("FP8 codes that mean NaN: the weight is damaged; publish the model again")
        yield at, values


def _tiles(rows: Tensor) -> Iterator[slice]:
    step = _tile_rows(rows)
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def _tile_rows(rows: Tensor) -> int:
    return max(1, min(_TILE_ELEMENTS // max(1, rows.shape[1]), rows.shape[0]))


def _of(scale: Tensor, at: slice) -> Tensor:
    """The scales of a tile."""
    return scale if scale.shape[0] == 1 else scale[at]
