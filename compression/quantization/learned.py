"""A weight under a codebook that is learned from it: what the k-means methods share."""

import torch
from torch import Tensor

from fleetpress.compression.quantization import codebooks
from fleetpress.compression.quantization.clusters import SortedNumbers, best_centers
from fleetpress.compression.quantization.values import check_dtype, check_values, compute_dtype
from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.compression.scheme import QuantScheme

_LEAST_IMPORTANCE = 1e-6  # of the mean: what was never seen on the data at hand still gets an entry near it


def learned(rows: Tensor, scheme: QuantScheme, importance: Tensor | None = None) -> QuantizedWeight:
    """`rows` [output units, entries] as indices into the codebook with the smallest squared error, entry by entry.

    `importance` (a shape that goes over `rows`) weighs the errors. Scales, where the scheme has them, are the largest
    magnitudes of the groups; then the codebook is that of the weights divided by them. Weights that are zero stay zero.
    Raises QuantizationError for NaN, infinite or overflowing weights and for dtypes that are no floating point.
    """
    check_dtype(rows)
    biggest = torch.maximum(rows.amax(), -rows.amin())
    check_values(rows, biggest)
    work = rows.to(compute_dtype(rows.dtype))
    scale = None
    if scheme.has_scale:
        scale = codebooks.as_scales(_largest(rows, scheme), rows.dtype, scheme)
        factor = _spread(codebooks.factors(scale, rows.dtype), rows, scheme)
        work = work / factor
        errors = factor.square()  # an error of a scaled weight costs that much
        importance = errors if importance is None else errors * _floored(importance)
    elif importance is not None:
        importance = _floored(importance)
    weights = None if importance is None else importance.expand(rows.shape).flatten()
    numbers = SortedNumbers(work.flatten(), weights)
    centers = best_centers(numbers, 1 << scheme.num_bits, keep_zero=bool((rows == 0).any()))
    # Without scales an entry is a weight as it is stored, in the weight's own dtype.
    codebook = (centers if scheme.has_scale else centers.to(rows.dtype)).to(work.dtype)
    codes = codebooks.quantize(rows, scale, codebook, scheme)
    return QuantizedWeight(
        codes=codes,
        scale=torch.ones(1, 1, dtype=rows.dtype) if scale is None else scale,
        zero_point=None,
        scheme=scheme,
        shape=tuple(rows.shape),
        codebook=codebook,
    )


def _largest(rows: Tensor, scheme: QuantScheme) -> Tensor:
    return torch.cat([tile.abs().amax(-1) for _, tile in codebooks.tiles(rows, scheme)])


def _spread(factor: Tensor, rows: Tensor, scheme: QuantScheme) -> Tensor:
    """Each weight's scale, a shape that goes over `rows`."""
    if scheme.group_size is None:
        return factor
    return factor.repeat_interleave(codebooks.group_counts(rows, scheme), dim=1)


def _floored(importance: Tensor) -> Tensor:
    mean = float(importance.mean(dtype=torch.float64))
    return importance.clamp(min=mean * _LEAST_IMPORTANCE) if mean > 0 else torch.ones_like(importance)
