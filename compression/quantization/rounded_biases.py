"""Biases with fewer significant digits: still numbers of their own dtype, which an entropy coder stores in few bytes.

A net whose weights take a fraction of a bit each has most of its other bytes in biases of 32. BF16 keeps 8 significant
bits and moves a bias by at most 1/256 of itself; FP8 (e4m3) keeps 4 and moves one by at most 1/16, and where that is
more, by 2^-17 of the tensor's largest. The exponents of FP8 are counted from the tensor's largest number, as a scale
that is a power of 2 would do: nothing overflows, and what is rounded is exact in float32.

Formats: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

import torch
from torch import Tensor

from fleetpress.compression.errors import MethodError

BIAS_FORMATS = ("BF16", "FP8")
_EXPONENT = 8  # of the largest number that scaled ones stay below: 2^8, half of what e4m3 holds
_MOST = 1000  # that float64 has room for


def rounded(bias: Tensor, form: str) -> Tensor:
    """A bias of any shape, each number rounded to the nearest (half to even) of the format; shape and dtype stay.

    Raises MethodError for a format that is none of `BIAS_FORMATS`. NaN and infinity stay what they are.
    """
    if form not in BIAS_FORMATS:
        raise MethodError(f"biases: {form} is unknown; give one of {', '.join(BIAS_FORMATS)}")
    values = bias.detach()
    if form == "BF16":
        return values.to(torch.bfloat16).to(bias.dtype)
    largest = values[values.isfinite()].abs().amax() if values.isfinite().any() else values.new_zeros(())
    if not largest:
        return values.clone()
    exponent = min(_MOST, _EXPONENT - int(torch.frexp(largest.double()).exponent))
    # In float64, where every power of 2 that a float32 or a half needs is there.
    scaled = torch.ldexp(values.double(), torch.tensor(exponent))
    coarse = torch.ldexp(scaled.to(torch.float8_e4m3fn).double(), torch.tensor(-exponent))
    return torch.where(values.isfinite(), coarse.to(bias.dtype), values)
