"""Affine quantization, the only place of its rounding: `weight ~ (code - zero_point) * scale`.

The formulas are those of compressed-tensors (quantization/utils/helpers.py): the range is stretched to hold zero;
symmetric scales are max|w| / ((2^b - 1) / 2), others (max - min) / (2^b - 1); codes are rounded half to even, clamped.
Arithmetic is in float32, for float64 weights in float64; codes belong to the scale as it is stored, in the weight's
own dtype. So codes and scales of float32 and float64 weights are that library's, and half-precision ones are those it
gives for the same weights as float32 under the same scales.

Error bound: |weight - dequantized| <= scale / 2. A scale that was rounded to bfloat16 or float16 (relative error u)
adds up to (2^b - 1) * u steps at the ends of the range, and the result is rounded to the weight's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fleetpress.compression.quantization.values import check_dtype, check_values, compute_dtype, fresh
from fleetpress.compression.scheme import QuantScheme

TILE_ELEMENTS = 1 << 20  # larger tiles leave the cache, smaller ones pay for calls (measured)


def quantization_parameters(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for `weight` [rows, columns], both [rows, groups] ([1, 1] for strategy tensor).

    Scales have the weight's dtype; zero points are uint8 codes, None if symmetric (then the middle code is zero).
    A group of zeros gets the dtype's epsilon as scale. The last group of a row may be shorter.
    Raises QuantizationError for NaN, infinite or overflowing weights and for dtypes that are no floating point.
    """
    check_dtype(weight)
    low, high = _ranges(weight, scheme)
    biggest = torch.maximum(high, -low)
    check_values(weight, biggest)
    steps = (1 << scheme.num_bits) - 1
    ideal = biggest / (steps / 2) if scheme.symmetric else (high - low) / steps
    if weight.dtype == torch.float16:
        # Float16 has few digits below 2^-14 and none below 2^-24: round up there, or the ends of the range are lost.
        ideal = torch.where(ideal < 2.0**-16, (ideal * 2.0**24).ceil() / 2.0**24, ideal)
    scale = ideal.to(weight.dtype)
    empty = scale == 0
    scale = torch.where(empty, torch.finfo(weight.dtype).eps, scale)
    if scheme.symmetric:
        return scale, None
    lowest = -scheme.middle
    zero_point = (lowest - low / scale.to(low.dtype)).clamp_(lowest, scheme.middle - 1).round_()
    zero_point = torch.where(empty, 0, zero_point) + scheme.middle
    return scale, zero_point.to(torch.uint8)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Codes uint8 [rows, columns] in 0..2^b - 1 of `weight` [rows, columns] for the given scales and zero points."""
    check_dtype(weight)
    signed = torch.empty(weight.shape, dtype=torch.int8)
    scale = scale.to(compute_dtype(weight.dtype))
    offset = None if zero_point is None else zero_point.to(scale.dtype) - scheme.middle
    buffer = _buffer(weight, scale.dtype)
    for rows, columns, group in _tiles(weight, scheme):
        work = _copied(weight[rows, columns], buffer)
        in_groups = work.view(*_split(work.shape, group))
        at = _group_index(rows, columns, group, scheme)
        in_groups.div_(scale[at].unsqueeze(-1))
        if offset is not None:
            in_groups.add_(offset[at].unsqueeze(-1))
        signed[rows, columns] = work.clamp_(-scheme.middle, scheme.middle - 1).round_()
    # To int8 and on in bytes: floats become int8 five times as fast as uint8 (measured).
    return signed.view(torch.uint8).add_(scheme.middle)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """The weight [rows, columns] in the scales' dtype: `(code - zero_point) * scale`, each operation rounded once."""
    weight = fresh(codes.shape, scale.dtype)
    # There the difference is exact, and the product is rounded once, to the weight's dtype.
    scale = scale.to(compute_dtype(scale.dtype))
    zero = None if zero_point is None else zero_point.to(scale.dtype)
    buffer = _buffer(codes, scale.dtype)
    for rows, columns, group in _tiles(codes, scheme):
        tile = weight[rows, columns]
        in_place = tile.dtype == scale.dtype and tile.is_contiguous()
        work = tile.copy_(codes[rows, columns]) if in_place else _copied(codes[rows, columns], buffer)
        in_groups = work.view(*_split(work.shape, group))
        at = _group_index(rows, columns, group, scheme)
        in_groups.sub_(scheme.middle if zero is None else zero[at].unsqueeze(-1))
        in_groups.mul_(scale[at].unsqueeze(-1))
        if not in_place:
            tile.copy_(work)
    return weight


def _ranges(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every group, stretched to hold zero."""
    rows, groups = scheme.groups(*weight.shape)
    low = torch.zeros(rows, groups, dtype=compute_dtype(weight.dtype))
    high = torch.zeros_like(low)
    buffer = _buffer(weight, low.dtype)
    for at_rows, columns, group in _tiles(weight, scheme):
        tile = weight[at_rows, columns]
        if tile.dtype != low.dtype:
            tile = _copied(tile, buffer)
        # amin and amax are vectorised over a last dimension of float32, aminmax is not (10 to 40 times slower).
        in_groups = tile.reshape(*_split(tile.shape, group))
        at = _group_index(at_rows, columns, group, scheme)
        tile_low, tile_high = in_groups.amin(-1), in_groups.amax(-1)
        if scheme.strategy == "tensor":
            tile_low, tile_high = tile_low.amin().view(1, 1), tile_high.amax().view(1, 1)
        low[at] = torch.minimum(low[at], tile_low)
        high[at] = torch.maximum(high[at], tile_high)
    return low, high


def _tiles(weight: Tensor, scheme: QuantScheme) -> Iterator[tuple[slice, slice, int]]:
    """Blocks of whole groups of one size: rows, columns, and the group size in them."""
    rows, columns = weight.shape
    if weight.numel() == 0:
        return
    group = min(scheme.group_size or columns, columns)
    full = columns - columns % group
    step = max(1, TILE_ELEMENTS // columns)
    for start in range(0, rows, step):
        at = slice(start, min(start + step, rows))
        yield at, slice(0, full), group
        if full < columns:
            yield at, slice(full, columns), columns - full


def _buffer(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for any of the tiles: memory that is used again costs far less than fresh memory."""
    return torch.empty(min(weight.numel(), max(TILE_ELEMENTS, weight.shape[1])), dtype=dtype)


def _copied(tile: Tensor, buffer: Tensor) -> Tensor:
    """The tile in the dtype of the buffer, whose beginning it takes."""
    return buffer[: tile.numel()].view(tile.shape).copy_(tile)


def _split(shape: torch.Size, group: int) -> tuple[int, int, int]:
    return shape[0], shape[1] // group, group


def _group_index(rows: slice, columns: slice, group: int, scheme: QuantScheme) -> tuple[slice, slice]:
    """Where the scales of a tile are."""
    if scheme.strategy == "tensor":
        return slice(0, 1), slice(0, 1)
    first = columns.start // (scheme.group_size or columns.stop)
    return rows, slice(first, first + (columns.stop - columns.start) // group)
