"""What a search looks for, what its trials measured, and which of them are taken. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .candidates import Family


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is looked for. `limit` bounds the drop of the metric; `budget` bounds the `cost`; the other one is least.

    `share` is the budget as a share of what the model costs before, where that is known.
    """

    goal: str
    cost: str
    limit: float | None = None
    budget: float | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A trial that was measured on held-out train data: its place in its family, its recipe, what came out.

    `drop` is that of the metric, in its own unit, with its `standard_error`; `costs` by name: bytes, macs, latency_ms.
    One that could not be built (`refused` says why) lost everything and has no costs. `expected` is what the solver
    expected of a fine-tuned one, by kind of change, and `divergence` what came of it.
    """

    digest: str
    family: Family
    x: float
    recipe: Mapping[str, Any]
    before: float
    after: float
    drop: float
    standard_error: float
    costs: Mapping[str, float]
    refused: str = ""
    expected: Mapping[str, float] = field(default_factory=dict)
    divergence: float = 0.0

    @property
    def bound(self) -> float:
        """The drop and one standard error: what is decided on."""
        return self.drop + self.standard_error


def measured_in(digest: str, result: Mapping[str, Any]) -> list[Measured]:
    """What the record of a trial tells: one measurement, or none if there was nothing to try."""
    if "skipped" in result:
        return []
    told = {name: result[name] for name in ("family", "x", "recipe")}
    if "refused" in result:
        lost: dict[str, Any] = {
            "before": math.nan,
            "after": math.nan,
            "drop": math.inf,
            "standard_error": 0.0,
        }
        return [Measured(digest=digest, **told, **lost, costs={}, refused=result["refused"])]
    names = ("before", "after", "drop", "standard_error", "costs")
    more = {name: result[name] for name in ("expected", "divergence") if name in result}
    return [Measured(digest=digest, **told, **{name: result[name] for name in names}, **more)]


def is_good(trial: Measured, goal: Goal) -> bool:
    """Whether a trial keeps what the goal asks for: the drop's bound in its limit, or its cost in its budget."""
    if not math.isfinite(trial.drop):
        return False
    if goal.budget is not None:
        return trial.costs[goal.cost] <= goal.budget
    assert goal.limit is not None
    return trial.bound <= goal.limit + 1e-12


def ranked(trials: Sequence[Measured], goal: Goal) -> list[Measured]:
    """Trials in the order to try them: the good ones, best first; then the others, the least bad first."""
    good = [trial for trial in trials if is_good(trial, goal)]
    rest = [trial for trial in trials if not is_good(trial, goal) and math.isfinite(trial.drop)]
    if goal.budget is None:
        good.sort(key=lambda trial: (trial.costs[goal.cost], trial.bound, trial.digest))
        rest.sort(key=lambda trial: (trial.bound, trial.costs[goal.cost], trial.digest))
    else:
        good.sort(key=lambda trial: (trial.drop, trial.costs[goal.cost], trial.digest))
        rest.sort(key=lambda trial: (trial.costs[goal.cost], trial.drop, trial.digest))
    return good + rest


def front(trials: Sequence[Measured], cost: str) -> list[Measured]:
    """The Pareto front of cost and drop, cheapest first."""
    found: list[Measured] = []
    known = [trial for trial in trials if math.isfinite(trial.drop)]
    for trial in sorted(known, key=lambda trial: (trial.costs[cost], trial.drop, trial.digest)):
        if not found or trial.drop < found[-1].drop:
            found.append(trial)
    return found


def refusals(tried: Sequence[Measured]) -> list[str]:
    """What the report says of candidates that could not be built, if any: the model may be larger for it."""
    reasons = [trial.refused for trial in tried if trial.refused]
    if not reasons:
        return []
    told = "; ".join(dict.fromkeys(reasons))
    return [f"{len(reasons)} of {len(tried)} candidates of the search could not be built: {told}"]
