"""Learn the codebook of a weight: the entries with the smallest squared error."""

from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.quantization.learned import learned
from fleetpress.compression.quantization.weight import QuantizedWeight, QuantizeMethod
from fleetpress.compression.scheme import QuantScheme


def k_means(rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None) -> QuantizedWeight:
    """Codes of `rows` [output units, entries] and their codebook; raises QuantizationError for bad values."""
    return learned(rows, scheme)


METHOD = QuantizeMethod(
    name="k_means",
    quantize=k_means,
    paper="Han et al. 2015, Deep Compression, arXiv:1510.00149, section 3 (trained quantization and weight sharing)",
    summary="Learn a codebook of 2^num_bits shared values per weight by k-means; for 1 to 8 bits; needs no data.",
    types=("codebook",),
    learns_codebook=True,
)
