"""Scales with the smallest squared error under a fixed codebook.

Ternary: a threshold keeps the k largest magnitudes, their mean is the best scale, and the error falls by its square
times k. So all thresholds are tried at once, by prefix sums of the sorted magnitudes: the optimum, which Li et al. 2016
(arXiv:1605.04711, equation 5) approximate. Binary: the mean is the optimum already. NF4: the best of narrower ranges.
MXFP4: the best of three exponents, since the one of the rule cuts off what lies between 6 and 8 times the scale.
"""

import math

import torch
from torch import Tensor

from fleetpress.compression.quantization import codebooks
from fleetpress.compression.scheme import QuantScheme

_SHARES = [
    1.0,
    *(step / 100 for step in range(98, 48, -2)),
]  # of the full range, the earlier one among equals
_EXPONENTS = (0, 1, -1)  # added to that of the rule


def best_scales(rows: Tensor, scheme: QuantScheme) -> Tensor:
    """As `codebooks.scales`, with the smallest squared error; never a larger one than there.

    Raises QuantizationError for bad values.
    """
    usual = codebooks.scales(rows, scheme)
    if scheme.codebook == "binary":
        return usual
    if scheme.codebook == "ternary":
        return _best_of(
            rows, [usual, codebooks.as_scales(_ternary(rows, scheme), rows.dtype, scheme)], scheme
        )
    if scheme.codebook == "mxfp4":
        moved = (usual.to(torch.int16) + step for step in _EXPONENTS)
        return _best_of(
            rows, [one.clamp(0, 2 * codebooks.EXPONENT_BIAS).to(torch.uint8) for one in moved], scheme
        )
    return _best_of(
        rows, [codebooks.as_scales(usual * share, rows.dtype, scheme) for share in _SHARES], scheme
    )


def _best_of(rows: Tensor, candidates: list[Tensor], scheme: QuantScheme) -> Tensor:
    """Of several scales for every group that with the smallest error."""
    codebook = codebooks.entries(scheme, rows.dtype)
    best, least = candidates[0].clone(), None
    for candidate in candidates:
        errors = _errors(rows, candidate, codebook, scheme)
        if least is None:
            least = errors
            continue
        better = errors < least
        best = torch.where(better, candidate, best)
        least = torch.where(better, errors, least)
    return best


def _errors(rows: Tensor, scale: Tensor, codebook: Tensor, scheme: QuantScheme) -> Tensor:
    """Sum of squares of every group [rows, groups] or [1, 1], float64, of the weights as they come back."""
    found = []
    step = max(1, codebooks.TILE_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        mine = codebooks.of_rows(scale, slice(start, start + step))
        codes = codebooks.quantize(part, mine, codebook, scheme)
        noise = codebooks.dequantize(codes, mine, codebook, scheme, rows.dtype).double() - part
        found += [codebooks.sums(tile.square()) for _, tile in codebooks.tiles(noise, scheme)]
    errors = torch.cat(found)
    if scheme.strategy == "tensor":
        return torch.tensor([[math.fsum(errors.flatten().tolist())]], dtype=torch.float64)
    return errors


def _ternary(rows: Tensor, scheme: QuantScheme) -> Tensor:
    """The optimal scales, float64 [rows, groups] or [1, 1]."""
    whole = rows.reshape(1, -1) if scheme.strategy == "tensor" else rows
    found = []
    for _, tile in codebooks.tiles(whole, scheme):
        sums = tile.abs().sort(-1, descending=True).values.cumsum(-1, dtype=torch.float64)
        kept = torch.arange(1, tile.shape[-1] + 1)
        most = (sums.square() / kept).argmax(-1, keepdim=True)
        found.append((sums.gather(-1, most) / (most + 1)).squeeze(-1))
    return torch.cat(found)
