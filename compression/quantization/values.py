"""What every way to quantize asks of a weight: a floating-point dtype, and finite values that leave room to compute."""

import torch
from torch import Tensor

from fleetpress.compression.errors import QuantizationError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtype(weight: Tensor) -> None:
    """Raises QuantizationError for a dtype that is no floating point."""
    if weight.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise QuantizationError(
            f"weights of dtype {str(weight.dtype).removeprefix('torch.')} cannot be quantized, only {names}; "
            "add the layer to `ignore`"
        )


def check_values(weight: Tensor, biggest: Tensor) -> None:
    """Raises QuantizationError for NaN, infinite or overflowing weights; `biggest` are their largest magnitudes."""
    # Negated, so that NaN is caught, too. Sums and products of larger values overflow.
    if not bool((biggest <= torch.finfo(weight.dtype).max / 4).all()):
        raise QuantizationError(_bad_values(weight))


def _bad_values(weight: Tensor) -> str:
    for value, words in ((weight.isnan(), "NaN"), (weight.isinf(), "infinite")):
        if count := int(value.sum()):
            return f"{count} of {weight.numel()} weights are {words}; repair the model or add the layer to `ignore`"
    return f"weights up to {float(weight.abs().max()):.3g} overflow {weight.dtype}; add the layer to `ignore`"
