"""What to publish, one after the other until something passes: what was measured, and between what was not. Pure.

None of it follows from the eval data, which only say whether a rung passes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

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
    found: list[tuple[Family, float]] = []
    for step in range(1, steps):
        at = low + (high - low) * step / steps
        expected = [
            (drop, family, x)
            for family in dict.fromkeys((upper.family, *(trial.family for trial in trials)))
            for drop, x in _expected(at, [trial for trial in trials if trial.family == family], goal)
        ]
        if not expected:
            continue
        drop, family, x = min(expected, key=lambda one: one[0])
        if drop <= _logarithm(lower, goal):
            found.append((family, x))
    return found


def _expected(at: float, mine: Sequence[Measured], goal: Goal) -> list[tuple[float, float]]:
    """The logarithm of the drop, and x, of one family at a cost whose logarithm is `at`; nothing where no two of its
    trials lie around it.
    """
    known = [trial for trial in mine if trial.costs and math.isfinite(trial.drop)]
    known.sort(key=lambda trial: trial.costs[goal.cost])
    for less, more in pairwise(known):
        low, high = (math.log(trial.costs[goal.cost]) for trial in (less, more))
        if low < at < high:
            share = (at - low) / (high - low)
            start, end = _logarithm(less, goal), _logarithm(more, goal)
            return [(start + share * (end - start), less.x * (more.x / less.x) ** share)]
    return []


def _logarithm(trial: Measured, goal: Goal) -> float:
    """Of the drop, which falls by factors as the cost grows."""
    least = _LEAST * goal.limit if goal.limit else math.ulp(0.0)
    return math.log(max(trial.drop, least))
