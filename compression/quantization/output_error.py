"""What a change of a weight does to the outputs of its layer, from the Gram matrix of what the layer reads.

Over N input rows x with Gram matrix G = sum x x^T, a change D [units, columns] of the weight changes the outputs by
squares that sum to tr(D G D^T): the objective that GPTQ, QuantEase and AdaRound minimize, each in its own way.
"""

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics

_PIECE_ELEMENTS = 1 << 22  # of the change that are multiplied at a time


def output_squares(change: Tensor, inputs: InputStatistics) -> Tensor:
    """Sum of squared changes of every unit's output [units], float64, for a `change` [units, columns] of the weight.

    Of a Gram matrix in blocks only the products within blocks are known.
    """
    units = change.shape[0]
    found = torch.zeros(units, dtype=torch.float64)
    step = max(1, _PIECE_ELEMENTS // max(1, change.shape[1]))
    for at, gram in inputs.blocks():
        for start in range(0, units, step):
            part = change[start : start + step, at].to(torch.promote_types(change.dtype, torch.float32))
            found[start : start + step] += ((part @ gram.to(part.dtype)) * part).sum(1, dtype=torch.float64)
    return found
