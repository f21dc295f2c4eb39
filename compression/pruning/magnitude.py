"""Magnitude: a unit with small weights is unimportant."""

import torch
from torch import Tensor

from fleetpress.compression.pruning.method import PruningMethod, ScoreContext, pooled
from fleetpress.compression.pruning.units import UnitGroup


def score(context: ScoreContext, group: UnitGroup) -> Tensor:
    """Per unit the root mean square of its incoming weights and biases."""
    squares: dict[str, Tensor] = {}
    entries: dict[str, int] = {}
    for name in context.rows(group):
        layer = context.layers[name]
        weight = context.values[layer.weights[0]].detach().transpose(0, layer.axis).flatten(1)
        total = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
        entries[name] = weight.shape[1]
        for bias in layer.biases:
            # A transposed convolution with groups has a bias for every group of a unit.
            values = context.values[bias].detach().to(torch.float64).reshape(-1, len(total))
            total = total + values.square().sum(0)
            entries[name] += values.shape[0]
        squares[name] = total / entries[name]
    return pooled(group, squares, entries)


METHOD = PruningMethod(
    name="magnitude",
    summary="deletes units with the smallest weights; needs no data",
    paper="Li et al. 2017, Pruning Filters for Efficient ConvNets (arXiv:1608.08710), with the 2-norm",
    score=score,
)
