"""Codes that are indices into a codebook, the only place of their rounding: `weight ~ codebook[code] * scale`.

The fixed codebooks, entries in the order of their codes:

- `nf4`: quantiles of the normal distribution, scaled to -1..1 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix
  E; the values are those of bitsandbytes). The scale is max|w|.
- `mxfp4`: floats of 4 bits, e2m1, sign in the highest bit; the scale is a power of two, stored as its exponent plus
  127: floor(log2 max|w|) - 2 (OCP Microscaling Formats (MX) Specification 1.0, 5.3.3 and 6.3). Halves go to the even
  code; what lies beyond 6 becomes 6. Exponents stop at -127: smaller weights become multiples of 2^-128.
- `ternary`: -1, 0, 1. The scale is the mean of all |w| above 0.7 mean|w| (Li et al. 2016, Ternary Weight Networks,
  arXiv:1605.04711), codes are the nearest to that.
- `binary`: -1, 1. The scale is mean|w|, which has the least squared error of all (Rastegari et al. 2016, XNOR-Net,
  arXiv:1603.05279). Zero becomes +scale: there is no zero.

Arithmetic is in float32, for float64 weights in float64; the result is rounded once, to the weight's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.errors import MethodError
from fleetpress.compression.quantization.values import check_dtype, check_values, compute_dtype
from fleetpress.compression.scheme import QuantScheme

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TABLES = {
    "nf4": _NF4,
    "mxfp4": (*_MAGNITUDES, *(-value for value in _MAGNITUDES)),
    "ternary": (-1.0, 0.0, 1.0),
    "binary": (-1.0, 1.0),
}
_TERNARY_THRESHOLD = 0.7
EXPONENT_BIAS = 127
_LARGEST_EXPONENT = 2  # of e2m1
TILE_ELEMENTS = 1 << 18


def entries(scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    """The fixed codebook, one entry a code, in the dtype of the arithmetic on weights of `dtype`."""
    if scheme.codebook not in _TABLES:
        raise MethodError(f"a {scheme.codebook} codebook is no fixed one; take method k_means")
    return torch.tensor(_TABLES[scheme.codebook], dtype=compute_dtype(dtype))


def scales(rows: Tensor, scheme: QuantScheme) -> Tensor:
    """Scales for `rows` [output units, entries] under a fixed codebook, [rows, groups], or [1, 1] for strategy tensor.

    In the weight's dtype; of mxfp4 uint8, the exponent plus 127. Groups of zeros get the dtype's epsilon, 0 if binary.
    Raises QuantizationError for NaN, infinite or overflowing weights and for dtypes that are no floating point.
    """
    if scheme.strategy == "tensor":
        rows = rows.reshape(1, -1)
    found = []
    for _, tile in tiles(rows, scheme):
        magnitudes = tile.abs()
        biggest = magnitudes.amax(-1)
        check_values(rows, biggest)
        if scheme.codebook == "mxfp4":
            found.append(_exponents(biggest))
        elif scheme.codebook == "nf4":
            found.append(biggest)
        else:
            found.append(_mean_scales(magnitudes, group_counts(rows, scheme), scheme))
    return as_scales(torch.cat(found), rows.dtype, scheme)


def as_scales(ideal: Tensor, dtype: torch.dtype, scheme: QuantScheme) -> Tensor:
    """Scales as they are stored for weights of `dtype`; exponents stay as they are."""
    if ideal.dtype == torch.uint8:
        return ideal
    scale = ideal.to(dtype)
    return scale if scheme.codebook == "binary" else torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def factors(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What scales multiply codebook entries with, in the dtype of the arithmetic on weights of `dtype`."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu).to(torch.float32)
    return scale.to(compute_dtype(dtype))


def quantize(rows: Tensor, scale: Tensor | None, codebook: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes uint8 [rows, columns] of `rows` under scales [rows, groups], [1, 1], or none; the nearest entry each.

    `codebook` ascends, except that of mxfp4.
    """
    check_dtype(rows)
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    factor = None if scale is None else factors(scale, rows.dtype)
    between = boundaries(codebook) if scheme.codebook != "mxfp4" else None
    for at, tile in tiles(rows, scheme):
        work = tile if factor is None else tile / of_rows(factor, at).unsqueeze(-1)
        if between is None:
            found = _e2m1_codes(work)
        elif scheme.codebook == "binary":
            found = (tile >= 0).to(torch.int32)
        else:
            found = torch.bucketize(work.contiguous(), between, out_int32=True)
        codes[at] = found.flatten(1)[:, : rows.shape[1]].to(torch.uint8)
    return codes


def dequantize(
    codes: Tensor, scale: Tensor | None, codebook: Tensor, scheme: QuantScheme, dtype: torch.dtype
) -> Tensor:
    """The weight [rows, columns] of `dtype`: `codebook[code] * scale`, rounded once."""
    weight = torch.empty(codes.shape, dtype=dtype)
    factor = None if scale is None else factors(scale, dtype)
    for at, tile in tiles(codes, scheme, dtype=torch.int32):
        values = codebook.index_select(0, tile.flatten()).view(tile.shape)
        if factor is not None:
            values.mul_(of_rows(factor, at).unsqueeze(-1))
        weight[at] = values.flatten(1)[:, : codes.shape[1]]
    return weight


def boundaries(codebook: Tensor) -> Tensor:
    """Where the nearest entry changes, between the entries of an ascending codebook; a half goes to the lower one."""
    return (codebook[1:] + codebook[:-1]) / 2


def of_rows(scale: Tensor, at: slice) -> Tensor:
    """The scales of a tile of rows."""
    return scale if scale.shape[0] == 1 else scale[at]


def tiles(
    rows: Tensor, scheme: QuantScheme, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows, some at a time, as [rows, groups, size] in the dtype of the arithmetic, or the one given.

    Zeros fill up the last group. Without groups there is one a row.
    """
    if dtype is None:
        check_dtype(rows)
    columns = rows.shape[1]
    size = min(scheme.group_size or columns, columns)
    step = max(1, TILE_ELEMENTS // max(1, columns))
    for start in range(0, rows.shape[0], step):
        at = slice(start, min(start + step, rows.shape[0]))
        tile = rows[at].to(compute_dtype(rows.dtype) if dtype is None else dtype)
        padded = functional.pad(tile, (0, -columns % size)) if columns % size else tile
        yield at, padded.reshape(padded.shape[0], -1, size)


def group_counts(rows: Tensor, scheme: QuantScheme) -> Tensor:
    """How many weights each group of a row really has, [groups]."""
    columns = rows.shape[1]
    size = min(scheme.group_size or columns, columns)
    counts = torch.full((-(-columns // size),), size)
    counts[-1] = columns - size * (len(counts) - 1)
    return counts


def _mean_scales(magnitudes: Tensor, counts: Tensor, scheme: QuantScheme) -> Tensor:
    means = sums(magnitudes) / counts
    if scheme.codebook == "binary":
        return means
    large = magnitudes > _TERNARY_THRESHOLD * means.unsqueeze(-1)
    return sums(magnitudes * large) / large.sum(-1).clamp(min=1)


def sums(values: Tensor) -> Tensor:
    """Sums over the last dimension in float64, the same bits with any number of threads."""
    alone = values.shape[:-1].numel() == 1  # a single sum would be split among threads
    whole = values.expand(2, *values.shape[1:]) if alone else values
    return whole.sum(-1, dtype=torch.float64)[: values.shape[0]]


def _exponents(biggest: Tensor) -> Tensor:
    """floor(log2 of the largest magnitudes) - 2 plus the bias, as uint8."""
    _, exponent = torch.frexp(biggest)
    exponent = torch.where(biggest == 0, -EXPONENT_BIAS, exponent - 1 - _LARGEST_EXPONENT)
    return (exponent.clamp(-EXPONENT_BIAS, EXPONENT_BIAS) + EXPONENT_BIAS).to(torch.uint8)


def _e2m1_codes(values: Tensor) -> Tensor:
    """The nearest e2m1 floats, int32, halves to the even code; magnitudes beyond 6 become 6."""
    between = boundaries(torch.tensor(_MAGNITUDES, dtype=values.dtype))
    # A half falls to the lower code; every second boundary lies just below the half, where the upper code is even.
    between[1::2] = torch.nextafter(between[1::2], torch.zeros_like(between[1::2]))
    return (
        torch.bucketize(values.abs().contiguous(), between, out_int32=True) + 8 * torch.signbit(values).int()
    )
