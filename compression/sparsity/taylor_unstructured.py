"""Taylor, weight by weight: one matters little if the loss changes little without it, to first order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetpress.compression.sparsity.scored import scored_method

if TYPE_CHECKING:
    from torch import Tensor

    from fleetpress.compression.weight_gradients import WeightMoments


def score(weight: Tensor, gradients: WeightMoments) -> Tensor:
    """|w_j E[g_j]|, g over the batches, in the weight's shape; float64, loss units.

    The mean of g is the gradient of the whole loss: near 0 in a net that has been trained to the end.
    """
    return (weight.double() * gradients.mean).abs()


METHOD = scored_method(
    name="taylor_unstructured",
    summary="zeroes weights without which the loss changes least, to first order: weight times mean gradient",
    paper="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning (arXiv:1906.10771), "
    "the first-order expansion of single weights",
    score=score,
    expands=True,
)
