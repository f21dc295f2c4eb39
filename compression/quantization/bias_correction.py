"""Bias correction: what rounding a weight shifts its outputs by on average goes into the bias.

Nagel et al. 2019, arXiv:1906.04721, section 4.2; Banner et al. 2019, arXiv:1810.05723.
"""

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.quantization.weight import QuantizedWeight, to_rows


def corrected_bias(
    bias: Tensor, weight: Tensor, quantized: QuantizedWeight, inputs: InputStatistics
) -> Tensor:
    """`bias` [units] plus (W - W_q) times the mean input: the mean of every output is what it was.

    `inputs` are those that the `weight` reads; of a convolution with groups, all its groups.
    """
    lost = to_rows(weight.detach() - quantized.dequantize(), quantized.axis).double()
    parts = zip(lost.chunk(inputs.groups), inputs.mean, strict=True)
    shift = torch.cat([part @ mean for part, mean in parts])
    return (bias.detach().double() + shift).to(bias.dtype)
