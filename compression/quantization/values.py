"""What every way to quantize asks of a weight: a floating-point dtype, and finite values that leave room to compute."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fleetpress.compression.errors import QuantizationError

_LARGE_BYTES = 4 << 20  # from here on NumPy asks for large pages
_ALIGNED_BYTES = 64  # as torch's own memory: sums of products may depend on it
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that holds anything. A large one is NumPy's, which is filled two to four times as fast as torch's: it asks
    the system for large pages (measured).
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes < _LARGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    room = np.empty(size_bytes + _ALIGNED_BYTES, np.uint8)
    start = -room.ctypes.data % _ALIGNED_BYTES
    return torch.from_numpy(room[start : start + size_bytes]).view(dtype).view(tuple(shape))


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
