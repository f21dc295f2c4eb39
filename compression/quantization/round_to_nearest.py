"""Round every weight to the nearest code of its group's range."""

from torch import Tensor

from fleetpress.compression.quantization import affine
from fleetpress.compression.quantization.weight import QuantizedWeight, QuantizeMethod
from fleetpress.compression.scheme import QuantScheme


def round_to_nearest(rows: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Codes, scales and zero points of `rows` [output units, entries]; raises QuantizationError for bad values."""
    scale, zero_point = affine.quantization_parameters(rows, scheme)
    return QuantizedWeight(
        codes=affine.quantize(rows, scale, zero_point, scheme),
        scale=scale,
        zero_point=zero_point,
        scheme=scheme,
        shape=tuple(rows.shape),
    )


METHOD = QuantizeMethod(
    name="round_to_nearest",
    quantize=round_to_nearest,
    paper="Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference, arXiv:1712.05877; range and rounding as in compressed-tensors",
    summary="Spread the codes over each group's range and round to the nearest; needs no data.",
)
