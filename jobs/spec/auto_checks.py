"""Options of `auto` that exclude each other, leave it without a bound, or want what another step says."""

from collections.abc import Iterator, Mapping
from typing import Any

from .recipe import BUDGETS, CHOSEN_STEPS, AutoStep, ValidateStep
from .yaml_lines import Path

# Metrics that are 1 at best and useless at 0, and losses whose metric, if none is named, is none of them. Both follow
# from compression.metrics, which lies behind torch; a test compares them.
SHARES = ("accuracy", "token_accuracy", "r2", "agreement", "cosine")
OTHERWISE = ("mse", "l1", "causal_lm")
Found = Iterator[tuple[Path, str]]


def check_auto(path: Path, step: AutoStep, steps: Mapping[str, Any]) -> Found:
    """Of an `auto` step among the plain `steps` of the recipe at `path`."""
    for name in CHOSEN_STEPS:
        if name in steps:
            yield (*path, name), "is chosen by auto; delete it, or delete auto and say everything yourself"
    given = [name for name in BUDGETS if getattr(step, name) is not None]
    if step.goal == "most_accurate" and not given:
        yield (*path, "auto"), f"most_accurate within which budget? add one of {', '.join(BUDGETS)}"
    if step.goal != "most_accurate" and given:
        yield (
            (*path, "auto", given[0]),
            f"is a budget, but {step.goal} is bounded by max_drop; take goal: most_accurate, or delete it",
        )
    if len(given) > 1:
        yield (*path, "auto", given[1]), f"excludes {given[0]}; keep one budget"
    validate = steps.get("validate")
    allowed = validate.get("max_drop") if isinstance(validate, dict) else None
    if step.max_drop is not None and allowed not in (None, step.max_drop):
        yield (*path, "validate", "max_drop"), f"contradicts auto's {step.max_drop}; delete one of them"
    if step.goal == "most_accurate" and step.max_drop is not None:
        what = "bounds smallest and fastest; most_accurate loses as little as its budget allows; delete it"
        yield (*path, "auto", "max_drop"), what


def check_bound(path: Path, step: AutoStep, validate: ValidateStep | None, data: Mapping[str, Any]) -> Found:
    """Of an `auto` step on `data`: a drop that leaves nothing of the metric bounds nothing."""
    metric = data.get("metric")
    is_share = metric in SHARES or (metric is None and data.get("loss") not in OTHERWISE)
    place, drop = "auto", step.max_drop
    if drop is None and validate is not None:
        place, drop = "validate", validate.max_drop
    if step.goal == "most_accurate" or not is_share or drop is None or _of_one(drop) < 1:
        return
    told = drop if isinstance(drop, str) else f"{drop:g}"
    what = (
        f"{told} accepts a model without any {metric or 'accuracy'}; write 1% for a hundredth of it, or 0.01"
    )
    yield (*path, place, "max_drop"), what


def _of_one(drop: float | str) -> float:
    """How much of a metric that is 1 the drop is."""
    return float(drop.rstrip("%")) / 100 if isinstance(drop, str) else drop
