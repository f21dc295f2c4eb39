"""Fisher, weight by weight: one matters little if the loss grows little without it, to second order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetpress.compression.sparsity.scored import scored_method

if TYPE_CHECKING:
    from torch import Tensor

    from fleetpress.compression.weight_gradients import WeightMoments


def score(weight: Tensor, gradients: WeightMoments) -> Tensor:
    """1/2 w_j^2 E[g_j^2] over the batches, in the weight's shape; float64, loss units.

    Optimal brain damage with the diagonal of the empirical Fisher matrix in place of the Hessian's. With batches of one
    sample that is the matrix itself; with larger ones g is the gradient of their mean loss.
    """
    return weight.double().square() * gradients.mean_square / 2


METHOD = scored_method(
    name="fisher_unstructured",
    summary="zeroes weights that matter least to the loss, to second order: the diagonal of the Fisher matrix",
    paper="LeCun et al. 1990, Optimal Brain Damage, with the empirical Fisher matrix of "
    "Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning (arXiv:1801.05787)",
    score=score,
    expands=True,
)
