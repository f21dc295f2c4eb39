"""Round every weight to the nearest code of its group's range."""

from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.quantization.weight import QuantizedWeight, QuantizeMethod, encoded, parameters
from fleetpress.compression.scheme import QuantScheme


def round_to_nearest(
    rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None
) -> QuantizedWeight:
    """Codes, scales and zero points of `rows` [output units, entries]; raises QuantizationError for bad values."""
    return encoded(rows, *parameters(rows, scheme), scheme)


METHOD = QuantizeMethod(
    name="round_to_nearest",
    quantize=round_to_nearest,
    paper="Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference, arXiv:1712.05877; range and rounding as in compressed-tensors",
    summary="Spread the codes over each group's range and round to the nearest; needs no data.",
    types=("int", "float", "codebook"),
)
