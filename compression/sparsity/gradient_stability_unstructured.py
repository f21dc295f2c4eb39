"""Gradient stability, weight by weight: one whose gradients have a mean near 0 and hardly vary is unimportant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetpress.compression.sparsity.scored import scored_method

if TYPE_CHECKING:
    from torch import Tensor

    from fleetpress.compression.weight_gradients import WeightMoments


def score(weight: Tensor, gradients: WeightMoments) -> Tensor:
    """sqrt(mu_j^2 + var_j) over the batches, in the weight's shape; float64, gradient units.

    The stability of a neuron that has one entry: its root mean square gradient. The weight itself does not count.
    """
    return gradients.mean_square.sqrt()


METHOD = scored_method(
    name="gradient_stability_unstructured",
    summary="zeroes weights whose gradients over the training batches are small and steady",
    paper="Method of the source article, for single weights instead of neurons",
    score=score,
    expands=False,
)
