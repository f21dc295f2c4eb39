"""Learn the codebook of a weight, its errors weighed by what they do to the layer's outputs."""

from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.quantization.learned import learned
from fleetpress.compression.quantization.weight import QuantizedWeight, QuantizeMethod
from fleetpress.compression.scheme import QuantScheme


def weighted_k_means(
    rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None
) -> QuantizedWeight:
    """As k_means; an error of a weight counts by the second moment of the input that is multiplied with it.

    Where gradients of the outputs are known, also by their second moment: the product estimates the diagonal of the
    Fisher information, which SqueezeLLM weighs with. Raises QuantizationError for bad values.
    """
    assert statistics is not None, "the method says needs_inputs"
    units = (
        rows.shape[0] // statistics.inputs.groups
    )  # of a convolution with groups, each reads inputs of its own
    importance = statistics.inputs.squares.repeat_interleave(units, dim=0)
    if statistics.output_squares is not None:
        importance = importance * statistics.output_squares[:, None]
    return learned(rows, scheme, importance)


METHOD = QuantizeMethod(
    name="weighted_k_means",
    quantize=weighted_k_means,
    paper="Kim et al. 2023, SqueezeLLM, arXiv:2306.07629, section 4.1 (sensitivity-based non-uniform quantization)",
    summary="k_means whose errors count by the second moments of the inputs they are multiplied with.",
    needs_inputs=True,
    types=("codebook",),
    learns_codebook=True,
)
