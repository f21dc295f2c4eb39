"""What to publish, one after the other until something passes: what was measured, and between what was not. Pure.

None of it follows from the eval data, which only say whether a rung passes.
"""

import math
from collections.abc import Sequence

import numpy as np

from .candidates import Family
from .measured import Goal, Measured, is_good, ranked

_RUNG = 1.1  # factor of the cost from one rung to the next, where both lost as much
_STEP = 1.04  # about that factor between rungs of which some were not measured
_MOST_STEPS = 6  # from one that was measured to the next
_LEAST = 1e-3  # of the limit: what was lost less than this is not told apart


def ladder(trials: Sequence[Measured], goal: Goal) -> list[Measured]:
    """The trials to publish, one after the other until one passes: the best, then only what lost less before, or no
    more and costs a tenth more.

    For a budget of the cost: then only what cost less; nothing that was over it if anything was not.
    """
    rungs: list[Measured] = []
    for trial in ranked(trials, goal):
        if goal.budget is not None and rungs and not is_good(trial, goal):
            break
        if not rungs or _is_safer(trial, rungs[-1], goal):
            rungs.append(trial)
    return rungs


def _is_safer(trial: Measured, last: Measured, goal: Goal) -> bool:
    if goal.budget is not None:
        return trial.costs[goal.cost] < last.costs[goal.cost]
    costs_more = trial.costs[goal.cost] > _RUNG * last.costs[goal.cost]
    return trial.drop < last.drop or (trial.drop <= last.drop and costs_more)


def between(
    lower: Measured, upper: Measured, trials: Sequence[Measured], goal: Goal
) -> list[tuple[Family, float]]:
    """Places (family, x) between two rungs of a limited drop, cheapest first; none where they are close.

    Each is of the family that is expected to lose least at its cost, read off between the two of its trials that lie
    around it.
    """
    ends = [trial.costs[goal.cost] for trial in (lower, upper)]
    if goal.limit is None or not 0 < ends[0] < ends[1]:
        return []
    low, high = (math.log(cost) for cost in ends)
    steps = min(_MOST_STEPS, round((high - low) / math.log(_STEP)))
    families = {
        family: _by_cost(family, trials, goal) for family in (trial.family for trial in (upper, *trials))
    }
    found: list[tuple[Family, float]] = []
    for step in range(1, steps):
        at = low + (high - low) * step / steps
        expected = [
            (float(np.interp(at, costs, drops)), family, math.exp(np.interp(at, costs, places)))
            for family, (costs, drops, places) in families.items()
            if costs and costs[0] < at < costs[-1]
        ]
        if not expected:
            continue
        drop, family, x = min(expected, key=lambda one: one[0])
        if drop <= _logarithm(lower, goal):
            found.append((family, x))
    return found


def _by_cost(
    family: Family, trials: Sequence[Measured], goal: Goal
) -> tuple[list[float], list[float], list[float]]:
    """Logarithms of the costs, the drops and x of a family's trials that were built, cheapest first."""
    known = [
        trial for trial in trials if trial.family == family and trial.costs and math.isfinite(trial.drop)
    ]
    known.sort(key=lambda trial: trial.costs[goal.cost])
    return (
        [math.log(trial.costs[goal.cost]) for trial in known],
        [_logarithm(trial, goal) for trial in known],
        [math.log(trial.x) for trial in known],
    )


def _logarithm(trial: Measured, goal: Goal) -> float:
    """Of the drop, which falls by factors as the cost grows."""
    least = _LEAST * goal.limit if goal.limit else math.ulp(0.0)
    return math.log(max(trial.drop, least))
