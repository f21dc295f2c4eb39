"""The grid of a layer's inputs: 8-bit integers by one scale and one zero point, fixed from calibration statistics.

`input ~ (code - zero_point) * scale`, codes -128 to 127, zero representable (Jacob et al. 2018, arXiv:1712.05877). The
range is that of the inputs seen, or the part of it with the smallest squared error, as their histogram tells it
(Nagel et al. 2021, arXiv:2106.08295, section 3.1).
"""

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics

LOWEST, HIGHEST = -128, 127
_IN_BIN = 8  # numbers that stand for all in a bin of the histogram
_SHARES = [step / 40 for step in range(40, 1, -1)]  # of the largest magnitude; the larger among equals


def input_grid(seen: InputStatistics, *, narrowed: bool) -> tuple[float, int]:
    """Scale and zero point for inputs such as were `seen`; `narrowed` to the range with the smallest error."""
    low, high = min(0.0, float(seen.range[0])), max(0.0, float(seen.range[1]))
    if narrowed and seen.histogram is not None:
        low, high = _least_error(seen.histogram, low, high)
    return _grid(low, high)


def _grid(low: float, high: float) -> tuple[float, int]:
    scale = float(torch.tensor((high - low) / (HIGHEST - LOWEST), dtype=torch.float32))
    if scale == 0:
        return 1.0, 0
    return scale, max(LOWEST, min(HIGHEST, round(LOWEST - low / scale)))


def _least_error(histogram: Tensor, low: float, high: float) -> tuple[float, float]:
    values, counts = _spread(histogram)
    values.clamp_(low, high)
    best, least = (low, high), None
    for share in _SHARES:
        limit = share * max(-low, high)
        ends = max(low, -limit), min(high, limit)
        scale, zero = _grid(*ends)
        codes = (values / scale + zero).round_().clamp_(LOWEST, HIGHEST)
        cost = float(((codes - zero) * scale - values).square_().sum(1).dot(counts))
        if least is None or cost < least:
            best, least = ends, cost
    return best


def _spread(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers evenly spread over every filled bin, [bins, 8], and how many are in the bin, float64."""
    bins = histogram.nonzero()[:, 0]
    bits = (bins[:, None] << 20) + (torch.arange(_IN_BIN) * 2 + 1) * (1 << 20) // (2 * _IN_BIN)
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    return bits.view(torch.float32).double(), histogram[bins].double()
