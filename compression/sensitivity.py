"""By how much the loss will grow when weights change: a second-order estimate from calibration statistics.

To second order a change of a layer's outputs by dy adds half the mean of (g . dy)^2 to the loss, with g the gradient of
a sample's loss (Fisher information in place of the Hessian: LeCun et al. 1989, Optimal Brain Damage; Theis et al. 2018,
arXiv:1801.05787). Inputs and output gradients are taken as independent (Martens & Grosse 2015, arXiv:1503.05671), so
the Gram matrix of a layer's inputs and the squared gradients of its outputs, each collected once, price any change.
"""

import math

import torch
from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.losses import both_masked
from fleetpress.compression.outputs import Meaning


def expected_increase(change: Tensor, statistics: WeightStatistics, samples: int) -> float:
    """By how much the mean loss of a sample is expected to grow for a `change` [units, columns] of a weight's rows.

    `statistics` are over `samples` samples and hold output gradients; in the unit of the loss. Raises
    DataMismatchError without output gradients.
    """
    return float(unit_increases(change, statistics, samples).sum())


def unit_increases(change: Tensor, statistics: WeightStatistics, samples: int) -> Tensor:
    """The same unit by unit, float64 [units]: with minus the weight's rows, what deleting a unit alone would cost."""
    if statistics.output_squares is None:
        raise DataMismatchError("the statistics hold no output gradients; calibrate with a loss")
    return 0.5 * statistics.output_squares * output_errors(change, statistics) / max(1, samples)


def output_errors(change: Tensor, statistics: WeightStatistics) -> Tensor:
    """Mean squared change of every unit's output, float64 [units], for a `change` [units, columns] of its rows."""
    inputs = statistics.inputs
    parts = []
    for index, rows in enumerate(change.detach().float().chunk(inputs.groups)):
        total = torch.zeros(len(rows), dtype=torch.float64)
        for at, gram in inputs.group(index).blocks():
            total += (rows[:, at] @ gram * rows[:, at]).sum(1, dtype=torch.float64)
        parts.append(total.clamp(min=0) / inputs.counted[index])
    return torch.cat(parts)


def divergence(before: Tensor, after: Tensor, meaning: Meaning) -> float:
    """How far outputs [samples, ...] moved, in the unit of `expected_increase`, as a mean over samples.

    Class scores: Kullback-Leibler divergence of their distributions, summed over a sample's predictions; values: half
    the squared distance, summed over a sample's entries. Infinite where outputs became NaN or infinite.
    """
    one, other = before.double(), after.double()
    if meaning == "logits":
        one, other = one.log_softmax(-1), other.log_softmax(-1)
    elif meaning == "probabilities":
        one, other = one.clamp(min=1e-30).log(), other.clamp(min=1e-30).log()
    apart = 0.5 * (one - other).square() if meaning == "values" else one.exp() * (one - other)
    total = float(apart.masked_fill(both_masked(one, other), 0.0).sum())
    return math.inf if math.isnan(total) else max(0.0, total) / len(one)
