"""How far a program's outputs are from those of its teacher, the model before pruning."""

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.losses import LOSSES, class_axis, without_masked

_SCORES = ("cross_entropy", "causal_lm")  # losses whose outputs are scores of classes


def distance(loss: str, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """A scalar, the mean over the batch, to be added to the `loss` of that name.

    For scores of classes the Kullback-Leibler divergence of the softened probabilities `softmax(scores / temperature)`,
    times temperature^2, so that its gradients are of the size of the plain loss's (Hinton et al. 2015, Distilling the
    Knowledge in a Neural Network, arXiv:1503.02531). For all other outputs the mean squared difference.
    """
    if loss not in _SCORES:
        return LOSSES["mse"].compute(outputs, teacher)
    axis = outputs.dim() - 1 if loss == "causal_lm" else class_axis(outputs, targets)
    ours = torch.log_softmax(outputs / temperature, axis)
    theirs = torch.log_softmax(teacher / temperature, axis)
    value = _divergence(ours, theirs, axis)
    return (_divergence(*without_masked(ours, theirs), axis) if value.isnan() else value) * temperature**2


def _divergence(ours: Tensor, theirs: Tensor, axis: int) -> Tensor:
    return functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(axis).mean()
