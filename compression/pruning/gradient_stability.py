"""Gradient stability: a unit whose gradients have a mean near 0 and hardly vary is unimportant."""

import torch
from torch import Tensor

from fleetpress.compression.errors import MethodError
from fleetpress.compression.pruning.method import PruningMethod, ScoreContext, pooled
from fleetpress.compression.pruning.units import UnitGroup


def gradient_mean_and_std(context: ScoreContext, group: UnitGroup) -> tuple[Tensor, Tensor]:
    """Per unit sqrt(mean_j mu_j^2) and sqrt(mean_j var_j) over all its entries j; float64, gradient units."""
    missing = [layer for layer in group.layers if layer not in context.statistics]
    if missing:
        raise MethodError(
            f"gradient_stability needs the gradient statistics of {', '.join(missing)}; add `train` or `collect`"
        )
    found = {layer: context.statistics[layer] for layer in group.layers}
    entries = {layer: item.entries for layer, item in found.items()}
    means = {layer: item.mean_square * item.entries for layer, item in found.items()}
    variances = {layer: item.variance * item.entries for layer, item in found.items()}
    return pooled(group, means, entries), pooled(group, variances, entries)


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
