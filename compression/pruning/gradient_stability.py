"""Gradient stability: a unit whose gradients have a mean near 0 and hardly vary is unimportant."""

import torch
from torch import Tensor

from fleetpress.compression.pruning.method import PruningMethod, ScoreContext, collected, pooled
from fleetpress.compression.pruning.units import UnitGroup


def gradient_mean_and_std(context: ScoreContext, group: UnitGroup) -> tuple[Tensor, Tensor]:
    """Per unit sqrt(mean_j mu_j^2) and sqrt(mean_j var_j) over all its entries j; float64, gradient units."""
    found = collected(context, group, "gradient_stability")
    entries = {name: item.entries for name, item in found.items()}
    return (
        pooled(group, {name: item.mean_square for name, item in found.items()}, entries),
        pooled(group, {name: item.variance for name, item in found.items()}, entries),
    )


def score(context: ScoreContext, group: UnitGroup) -> Tensor:
    """Per unit sqrt(gradient_mean^2 + gradient_std^2), the root mean square gradient."""
    return torch.hypot(*gradient_mean_and_std(context, group))


METHOD = PruningMethod(
    name="gradient_stability",
    summary="deletes units whose gradients over the training batches are small and steady",
    paper="Method of the source article: mean and standard deviation of every neuron's gradients over the iterations",
    score=score,
    needs_gradients=True,
    spread=gradient_mean_and_std,
)
