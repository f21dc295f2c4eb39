"""Losses by name, each a mean over the batch; one method, one line in `LOSSES`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.outputs import Meaning


@dataclass(frozen=True, kw_only=True)
class Loss:
    """`compute(outputs, targets)` is a scalar, the mean over what it counts; `weight(targets)` is how much it counted.

    Without `needs_targets` the targets are the original model's own outputs.
    """

    name: str
    needs_targets: bool
    compute: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Tensor], int]
    summary: str


def class_axis(outputs: Tensor, targets: Tensor) -> int:
    """Where the classes lie: dimension 1 as in torch, or the last one when only that fits the targets' shape."""
    without = (*outputs.shape[:1], *outputs.shape[2:])
    return 1 if tuple(targets.shape) == without or targets.shape == outputs.shape else outputs.dim() - 1


def aligned(outputs: Tensor, targets: Tensor) -> Tensor:
    """The targets in the outputs' shape, so that (N,) beside (N, 1) is not broadcast to (N, N)."""
    return targets if targets.shape == outputs.shape else targets.reshape(outputs.shape)


def next_tokens(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B * (T - 1), V] and the tokens [B * (T - 1)] that follow: position t predicts token t + 1."""
    return outputs[:, :-1].reshape(-1, outputs.shape[-1]), targets[:, 1:].reshape(-1)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return functional.cross_entropy(outputs, targets.to(outputs.dtype))
    scores = outputs.movedim(class_axis(outputs, targets), 1)
    total = functional.cross_entropy(scores, targets.long(), reduction="sum", ignore_index=-100)
    return total / max(_labels(targets), 1)


def _causal_lm(outputs: Tensor, targets: Tensor) -> Tensor:
    scores, tokens = next_tokens(outputs, targets)
    return _cross_entropy(scores, tokens)


def both_masked(one: Tensor, other: Tensor) -> Tensor:
    """Where both are minus infinity (bool): scores that a model masks, whose difference is no number."""
    return one.isneginf() & other.isneginf()


def without_masked(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros where both are masked."""
    masked = both_masked(one, other)
    return one.masked_fill(masked, 0.0), other.masked_fill(masked, 0.0)


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, aligned(outputs, targets).to(outputs.dtype))


def _distillation(outputs: Tensor, targets: Tensor) -> Tensor:
    return _mse(*without_masked(outputs, aligned(outputs, targets)))


def _l1(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.l1_loss(outputs, aligned(outputs, targets).to(outputs.dtype))


def _bce_with_logits(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, aligned(outputs, targets).to(outputs.dtype))


def _labels(targets: Tensor) -> int:
    return len(targets) if targets.is_floating_point() else int((targets.long() != -100).sum())


def _following_labels(targets: Tensor) -> int:
    return _labels(targets[:, 1:])


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            name="cross_entropy",
            needs_targets=True,
            compute=_cross_entropy,
            weight=_labels,
            summary="labels or class probabilities; label -100 is ignored",
        ),
        Loss(name="mse", needs_targets=True, compute=_mse, weight=len, summary="mean squared error"),
        Loss(name="l1", needs_targets=True, compute=_l1, weight=len, summary="mean absolute error"),
        Loss(
            name="bce_with_logits",
            needs_targets=True,
            compute=_bce_with_logits,
            weight=len,
            summary="yes or no per output, before the sigmoid",
        ),
        Loss(
            name="causal_lm",
            needs_targets=True,
            compute=_causal_lm,
            weight=_following_labels,
            summary="next token; targets are the input tokens, shifted inside; token -100 is ignored",
        ),
        # Squared distance, not the divergence of softmaxes: that one is blind to shifts and would spoil a regression
        # which only looks like class scores; for class scores it does as well (Kim et al. 2021, arXiv:2105.08919).
        Loss(
            name="distillation",
            needs_targets=False,
            compute=_distillation,
            weight=len,
            summary="mean squared distance to the original model's own outputs; needs no targets",
        ),
    )
}


def sampled_targets(outputs: Tensor, generator: torch.Generator, *, meaning: Meaning) -> Tensor:
    """Targets drawn from the model's own predictive distribution, for gradient statistics without labels.

    At the original weights the distance to the original outputs has no gradient at all. Drawn targets give the
    gradients whose second moment is the true Fisher information (Kunstner et al. 2019, arXiv:1905.12558): classes from
    the softmax over the last dimension, unit Gaussian noise around values. Where outputs are NaN, whose loss is NaN
    whatever the target, all classes are as likely.
    """
    outputs = outputs.detach()
    if meaning == "values":
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float32)
        return outputs + noise.to(outputs.dtype)
    if meaning == "probabilities":
        chances = outputs.float().nan_to_num(nan=1.0, posinf=1.0)
    else:
        chances = outputs.float().softmax(-1).nan_to_num_(nan=1.0)
    drawn = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1, generator=generator)
    return drawn.reshape(outputs.shape[:-1])


def sampled_loss(outputs: Tensor, generator: torch.Generator, *, meaning: Meaning) -> Tensor:
    """Mean negative log-likelihood of `sampled_targets`, up to a constant."""
    targets = sampled_targets(outputs, generator, meaning=meaning)
    if meaning == "values":
        return 0.5 * _distillation(outputs, targets)
    scores = outputs.log() if meaning == "probabilities" else outputs
    return functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))
