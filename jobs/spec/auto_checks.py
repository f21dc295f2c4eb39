"""Options of `auto` that exclude each other, leave it without a bound, or want what another step says."""

from collections.abc import Iterator, Mapping
from typing import Any

from .recipe import BUDGETS, CHOSEN_STEPS, AutoStep

# Metrics that are 1 at best and useless at 0, and losses whose metric, if none is named, is none of them. Both follow
# from compression.metrics, which lies behind torch; a test compares them.
SHARES = ("accuracy", "token_accuracy", "r2", "agreement", "cosine")
OTHERWISE = ("mse", "l1", "causal_lm")


def check_auto(step: AutoStep, steps: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Of an `auto` step among the plain `steps` of its recipe: where, and what is wrong."""
    for name in CHOSEN_STEPS:
        if name in steps:
            yield (name,), "is chosen by auto; delete it, or delete auto and say everything yourself"
    given = [name for name in BUDGETS if getattr(step, name) is not None]
    if step.goal == "most_accurate" and not given:
        yield ("auto",), f"most_accurate within which budget? add one of {', '.join(BUDGETS)}"
    if step.goal != "most_accurate" and given:
        yield (
            ("auto", given[0]),
            f"is a budget, but {step.goal} is bounded by max_drop; take goal: most_accurate, or delete it",
        )
    if len(given) > 1:
        yield ("auto", given[1]), f"excludes {given[0]}; keep one budget"
    allowed = _gate(steps)
    if step.max_drop is not None and allowed not in (None, step.max_drop):
        yield ("validate", "max_drop"), f"contradicts auto's {step.max_drop}; delete one of them"
    if step.goal == "most_accurate" and step.max_drop is not None:
        what = "bounds smallest and fastest; most_accurate loses as little as its budget allows; delete it"
        yield ("auto", "max_drop"), what


def check_bound(
    step: AutoStep, steps: Mapping[str, Any], data: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Of an `auto` step on `data`: a drop that leaves nothing of the metric bounds nothing."""
    metric = data.get("metric")
    shares = metric in SHARES or (metric is None and data.get("loss") not in OTHERWISE)
    place, accepted = ("auto", "max_drop"), step.max_drop
    if accepted is None:
        place, accepted = ("validate", "max_drop"), _gate(steps)
    if step.goal == "most_accurate" or not shares or not _is_whole(accepted):
        return
    told = accepted if isinstance(accepted, str) else f"{accepted:g}"
    what = f"{told} accepts a model without any {metric or 'accuracy'}; write 1% for a hundredth of it"
    yield place, f"{what}, or 0.01"


def _gate(steps: Mapping[str, Any]) -> Any:
    validate = steps.get("validate")
    return validate.get("max_drop") if isinstance(validate, dict) else None


def _is_whole(drop: Any) -> bool:
    """Whether the drop is all of a metric that is 1 at best: absolute from 1, relative from 100%."""
    try:
        return float(drop.rstrip("%")) >= 100 if isinstance(drop, str) else drop is not None and drop >= 1
    except (TypeError, ValueError):  # pydantic says what is wrong with it
        return False
