"""How far a program's outputs are from those of its teacher, the model before pruning."""

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.losses import LOSSES, both_masked, class_axis

_SCORES = ("cross_entropy", "causal_lm")  # losses whose outputs are scores of classes


def distance(loss: str, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """A scalar, the mean over the batch, to be added to the `loss` of that name.

    For scores of classes the Kullback-Leibler divergence of the softened probabilities `softmax(scores / temperature)`,
    times temperature^2, so that its gradients are of the size of the plain loss's (Hinton et al. 2015, Distilling the
    Knowledge in a Neural Network, arXiv:1503.02531). For all other outputs the mean squared difference.
    """
    if loss not in _SCORES:
        return LOSSES["distillation"].compute(outputs, teacher)
    axis = outputs.dim() - 1 if loss == "causal_lm" else class_axis(outputs, targets)
    ours = torch.log_softmax(outputs / temperature, axis)
    theirs = torch.log_softmax(teacher / temperature, axis)
    divergence = functional.kl_div(ours, theirs, log_target=True, reduction="none")
    return divergence.masked_fill(both_masked(ours, theirs), 0.0).sum(axis).mean() * temperature**2
