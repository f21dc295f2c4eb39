"""Metrics by name, exact over any split into batches; one method, one line in `METRICS`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.errors import MethodError
from fleetpress.compression.losses import aligned, class_axis, next_tokens, without_masked
from fleetpress.compression.outputs import Meaning

Sums = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`update(sums, outputs, expected)` adds a batch to the sums of `start()`; `value(sums)` is the metric.

    `expected` are the targets or, with needs "reference", the original model's outputs.
    """

    name: str
    higher_is_better: bool
    needs: Literal["targets", "reference"]
    update: Callable[[Sums, Tensor, Tensor], None]
    value: Callable[[Sums], float]
    summary: str

    def start(self) -> Sums:
        """Sums over nothing."""
        return {}


def merged(sums: Sums, others: Sums) -> Sums:
    """Sums over both sets of samples."""
    result = dict(sums)
    for key, value in others.items():
        _add(result, key, value)
    return result


def _add(sums: Sums, key: str, value: float | Tensor) -> None:
    value = float(value)
    if key in ("low", "high"):
        pick = min if key == "low" else max
        sums[key] = pick(sums.get(key, value), value)
    else:
        sums[key] = sums.get(key, 0.0) + value


def _share(sums: Sums) -> float:
    return sums["right"] / sums["count"] if sums.get("count") else math.nan


def _count_right(sums: Sums, right: Tensor) -> None:
    _add(sums, "right", right.sum())
    _add(sums, "count", right.numel())


def _accuracy(sums: Sums, outputs: Tensor, targets: Tensor) -> None:
    yes_or_no = outputs.dim() == 1 or outputs.numel() == targets.numel()
    if yes_or_no and (not targets.is_floating_point() or outputs[0].numel() == 1):
        _count_right(sums, (outputs > 0) == (aligned(outputs, targets) > 0.5))
        return
    if targets.is_floating_point():
        _count_right(sums, outputs.argmax(1) == targets.argmax(1))
        return
    guesses, targets = outputs.argmax(class_axis(outputs, targets)), targets.long()
    valid = targets != -100
    _count_right(sums, guesses[valid] == targets[valid])


def _token_accuracy(sums: Sums, outputs: Tensor, targets: Tensor) -> None:
    scores, tokens = next_tokens(outputs, targets.long())
    valid = tokens != -100
    _count_right(sums, scores.argmax(-1)[valid] == tokens[valid])


def _perplexity(sums: Sums, outputs: Tensor, targets: Tensor) -> None:
    scores, tokens = next_tokens(outputs, targets.long())
    nll = functional.cross_entropy(scores.float(), tokens, reduction="none", ignore_index=-100)
    _add(sums, "nll", nll.double().sum())
    _add(sums, "count", (tokens != -100).sum())


def _perplexity_value(sums: Sums) -> float:
    if not sums.get("count"):
        return math.nan
    try:
        return math.exp(sums["nll"] / sums["count"])
    except OverflowError:
        return math.inf


def _errors(sums: Sums, outputs: Tensor, targets: Tensor) -> None:
    expected = aligned(outputs, targets).double()
    _add(sums, "squares", (outputs.double() - expected).square().sum())
    _add(sums, "count", expected.numel())
    _add(sums, "targets", expected.sum())
    _add(sums, "targets_squares", expected.square().sum())
    _add(sums, "low", expected.min())
    _add(sums, "high", expected.max())


def _mse(sums: Sums) -> float:
    return sums["squares"] / sums["count"] if sums.get("count") else math.nan


def _psnr(sums: Sums) -> float:
    error = _mse(sums)
    if error == 0:
        return math.inf
    peak = sums.get("high", math.nan) - sums.get("low", math.nan)
    return 10 * math.log10(peak * peak / error) if peak > 0 and math.isfinite(error) else math.nan


def _r2(sums: Sums) -> float:
    if not sums.get("count"):
        return math.nan
    spread = sums["targets_squares"] - sums["targets"] ** 2 / sums["count"]
    return 1 - sums["squares"] / spread if spread > 0 else math.nan


def _agreement(sums: Sums, outputs: Tensor, reference: Tensor) -> None:
    if outputs[0].numel() == 1:
        _count_right(sums, (outputs > 0) == (reference > 0))
    else:
        _count_right(sums, outputs.argmax(-1) == reference.argmax(-1))


def _cosine(sums: Sums, outputs: Tensor, reference: Tensor) -> None:
    left, right = outputs.reshape(len(outputs), -1).double(), reference.reshape(len(outputs), -1).double()
    left, right = without_masked(left, right)
    lengths = left.norm(dim=1) * right.norm(dim=1)
    cosines = (left * right).sum(1) / lengths
    both_zero = (left == 0).all(1) & (right == 0).all(1)
    cosines = torch.where(lengths == 0, both_zero.double(), cosines).clamp(-1, 1)
    _add(sums, "right", cosines.sum())
    _add(sums, "count", len(outputs))


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="accuracy",
            higher_is_better=True,
            needs="targets",
            update=_accuracy,
            value=_share,
            summary="share of right classes; a single output, or whole-number targets per output, count as yes or no",
        ),
        Metric(
            name="token_accuracy",
            higher_is_better=True,
            needs="targets",
            update=_token_accuracy,
            value=_share,
            summary="share of right next tokens; targets are the input tokens, shifted inside",
        ),
        Metric(
            name="perplexity",
            higher_is_better=False,
            needs="targets",
            update=_perplexity,
            value=_perplexity_value,
            summary="exp of the mean negative log-likelihood of the next token",
        ),
        Metric(
            name="mse",
            higher_is_better=False,
            needs="targets",
            update=_errors,
            value=_mse,
            summary="mean squared error over all entries",
        ),
        Metric(
            name="psnr",
            higher_is_better=True,
            needs="targets",
            update=_errors,
            value=_psnr,
            summary="peak signal-to-noise ratio in dB; the peak is the range of all targets",
        ),
        Metric(
            name="r2",
            higher_is_better=True,
            needs="targets",
            update=_errors,
            value=_r2,
            summary="share of the targets' variance explained, over all entries together",
        ),
        Metric(
            name="agreement",
            higher_is_better=True,
            needs="reference",
            update=_agreement,
            value=_share,
            summary="share of the original model's decisions kept (largest score of each row)",
        ),
        Metric(
            name="cosine",
            higher_is_better=True,
            needs="reference",
            update=_cosine,
            value=_share,
            summary="mean cosine between the outputs and the original model's, sample by sample",
        ),
    )
}
_OF_LOSS = {
    "cross_entropy": "accuracy",
    "mse": "mse",
    "l1": "mse",
    "bce_with_logits": "accuracy",
    "causal_lm": "perplexity",
}


def default_metric(loss: str, meaning: Meaning) -> str:
    """The metric where none is named: that of the loss; without targets `agreement` for class scores, else `cosine`."""
    if loss in _OF_LOSS:
        return _OF_LOSS[loss]
    return "cosine" if meaning == "values" else "agreement"


def drop(metric: str, before: float, after: float) -> float:
    """How much worse `after` is, in the metric's own unit; negative when it is better."""
    if before == after:
        return 0.0
    return before - after if METRICS[metric].higher_is_better else after - before


def within(metric: str, before: float, after: float, max_drop: float | str) -> bool:
    """Whether the drop is at most `max_drop`: absolute, or a share of `before` when written as "1%". NaN never is."""
    if math.isnan(before) or math.isnan(after):
        return False
    allowed = allowed_drop(before, max_drop)
    # A drop of 0.99 - 0.98 is a hair above 0.01 in floating point.
    return drop(metric, before, after) <= allowed + 1e-12 * max(1.0, abs(allowed))


def allowed_drop(before: float, max_drop: float | str) -> float:
    """The drop in the metric's own unit that `max_drop`, absolute or a share such as "1%", allows."""
    return _percent(max_drop) * abs(before) if isinstance(max_drop, str) else max_drop


def _percent(text: str) -> float:
    try:
        if text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100
    except ValueError:
        pass
    raise MethodError(f"max_drop {text!r} is neither a number nor a percentage; write 0.01 or '1%'")
