"""The first lines of the page: what the run saved, and what that cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..runs.figures import (
    elapsed,
    lost,
    measured,
    metric_of,
    share,
    sized,
    three_digits,
)
from ..runs.results import (
    GOOD,
    FleetResult,
    ModelResult,
    counts,
    published_bytes,
)
from .timeline import Happened, traffic

_TOLD_METRICS = 3
_ORDER = ("published", "unchanged", "rejected", "failed", "running", "pending")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one metric lost over the published models: the worst and the mean drop, in the metric's own unit."""

    metric: str
    models: int
    lost: bool
    big: str
    worst: str
    worst_model: str
    mean: str
    improved: int


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Text of the tiles. `saved` and what follows are None where nothing is published."""

    good: int
    models: int
    states: Sequence[tuple[str, int, float, float]]  # how many, and their place and width in a bar, in %
    before: str
    after: str
    saved: str | None
    saved_share: str | None
    left_percent: float
    ratio: str | None
    costs: Sequence[Cost]
    other_metrics: int
    unmeasured: int
    wall: str
    task_time: str | None
    parallel: str | None
    traffic: str | None
    tasks: int
    retries: int


def headline(result: FleetResult, happened: Happened) -> Headline:
    """Of a run and its events."""
    before, after = published_bytes(result.models)
    good = [model for model in result.models if model.state in GOOD]
    costs = _costs(good)
    total = len(result.models)
    return Headline(
        good=len(good),
        models=total,
        states=_states(result),
        before=sized(before),
        after=sized(after),
        saved=sized(before - after) if after else None,
        saved_share=share(1 - after / before) if before and after else None,
        left_percent=round(min(100.0, 100 * after / before), 2) if before else 0.0,
        ratio=three_digits(before / after) if after else None,
        costs=costs[:_TOLD_METRICS],
        other_metrics=len(costs[_TOLD_METRICS:]),
        unmeasured=len(good) - sum(cost.models for cost in costs),
        wall=elapsed(result.seconds),
        task_time=elapsed(happened.task_seconds) if happened.task_seconds else None,
        parallel=_parallel(happened.task_seconds, result.seconds),
        traffic=traffic(
            happened.bytes_read or result.bytes_read or None,
            happened.bytes_written or result.bytes_written or None,
        ),
        tasks=len(happened.spans),
        retries=happened.retries or result.retries,
    )


def _states(result: FleetResult) -> list[tuple[str, int, float, float]]:
    found, start = [], 0.0
    known = counts(result.models)
    for state in sorted(known, key=_ORDER.index):
        number = known[state]
        width = 100 * number / len(result.models)
        found.append((state, number, round(start, 2), round(width, 2)))
        start += width
    return found


def _costs(good: Sequence[ModelResult]) -> list[Cost]:
    """By metric, that of the most models first."""
    drops: dict[str, list[tuple[float, str]]] = {}
    for model in good:
        drop, metric = lost(model), metric_of(model)
        if drop is not None and metric is not None:
            drops.setdefault(metric, []).append((drop, model.name))
    found = []
    for metric, its in sorted(drops.items(), key=lambda item: (-len(item[1]), item[0])):
        worst, name = max(its, key=lambda pair: pair[0])
        mean = sum(drop for drop, _ in its) / len(its)
        found.append(
            Cost(
                metric=metric,
                models=len(its),
                lost=worst > 0,
                big=measured(worst) if worst > 0 else "none",
                worst=told_drop(worst),
                worst_model=name,
                mean=told_drop(mean),
                improved=sum(drop < 0 for drop, _ in its),
            )
        )
    return found


def told_drop(drop: float) -> str:
    """How much worse a metric became, in words where it did not."""
    if drop < 0:
        return f"{measured(-drop)} better"
    return measured(drop) if drop else "the same"


def _parallel(task_seconds: float, seconds: float) -> str | None:
    """How many tasks ran at once, on average."""
    at_once = task_seconds / seconds if seconds > 0 else 0.0
    return f"{at_once:.1f}" if at_once >= 1.05 else None


def told_versions(result: FleetResult) -> list[tuple[str, str]]:
    """Libraries and their versions, in a fixed order."""
    return sorted((str(name), str(version)) for name, version in result.versions.items())
