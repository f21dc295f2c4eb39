"""Which candidates to measure next: pure functions of what was measured.

Every family is searched in its one number x: between the smallest that was good enough and the largest that was not
the next ones lie (on a logarithmic scale); while all were good, further down. All families share a round's trials.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .candidates import Family, recipe_of, starts
from .choices import Prices, Searched, Table
from .joint import corrected, is_outdated, place_of
from .measured import Goal, Measured, is_good, ranked
from .narrow import corrected_by_group, expected_by_group, is_narrow_outdated

_CLOSE = 1.04  # factor between two x that are not worth another trial
_STEP = 0.62  # further down while everything was good enough
_LEAP = 0.7  # of the cost of what is good already, for rounding alone, which is tried in seconds
_LEAST = 0.002
_AIMED = 0.9  # of the limit: a candidate just beyond it is worth nothing
_LINE = 2  # trials that make a line
_USED = 0.85  # of a budget, so that what was lost counts
_ABOVE = (1.3, 1.7)  # factors above the edge, for rungs of the ladder, where trials are left
_MORE_ABOVE = (1.15, 1.5, 2.0)  # where neighbours are often the same recipe


def propose(
    trials: Sequence[Measured], goal: Goal, table: Table, searched: Searched, count: int
) -> list[tuple[Family, float, dict[str, Any]]]:
    """At most `count` candidates (family, x, recipe) that are worth a trial after these. The first round is fixed."""
    share = goal.share
    if goal.budget is not None and goal.cost == "bytes":  # a small program's file is mostly graph
        share = min(0.9, goal.budget / table.float_bytes)
    begin = starts(searched, goal.cost, share)
    prices = prices_of(trials, goal, table)
    wanted: list[tuple[Family, float]] = []
    if not trials:
        wanted = _openings(begin)
    else:
        valid = [
            trial
            for trial in trials
            if trial.refused or is_good(trial, goal) or not _is_outdated(trial, table, searched, prices)
        ]
        lines = {
            family: _next(family, valid, goal, table)
            for family in begin
            if not _is_beaten(family, valid, goal, table)
        }
        best = [trial.family for trial in ranked(trials, goal)]
        if "joint" in lines and (x := _expected_edge(valid, goal, table, searched, prices)) is not None:
            lines["joint"].insert(0, x)
            best.insert(0, "joint")  # it is first in the next round
        order = sorted(lines, key=lambda family: best.index(family) if family in best else len(best))
        wanted = _in_turn([[(family, x) for x in lines[family]] for family in order])
    found: list[tuple[Family, float, dict[str, Any]]] = []
    known = [trial.recipe for trial in trials]
    for family, x in wanted:
        recipe = recipe_of(family, x, table, searched, prices)
        if recipe is not None and recipe not in known and len(found) < count:
            known.append(recipe)
            found.append((family, x, recipe))
    return found


def prices_of(trials: Sequence[Measured], goal: Goal, table: Table) -> Prices:
    """What trials tell of the prices: by kind of change where bytes count, by group of units where operations do."""
    if goal.cost == "bytes":
        # One share for all units costs less than its parts: it tells of prices only while there is nothing better.
        mine = [trial for trial in trials if trial.expected and trial.family == "joint"]
        told = mine or [trial for trial in trials if trial.expected]
        return corrected([(trial.expected, trial.divergence) for trial in told])
    known = [(expected_by_group(trial.recipe, table), trial.divergence) for trial in trials]
    return corrected_by_group([(expected, divergence) for expected, divergence in known if expected])


def _is_outdated(trial: Measured, table: Table, searched: Searched, prices: Prices) -> bool:
    """Whether the solver would now choose another, much better candidate of the same cost."""
    if trial.family == "joint":
        return is_outdated(trial.recipe, trial.x * table.float_bytes, table, searched, prices)
    if trial.family == "narrow":
        return is_narrow_outdated(trial.recipe, trial.x * table.macs, table, searched, prices)
    return False


def _in_turn(lines: Sequence[Sequence[tuple[Family, float]]]) -> list[tuple[Family, float]]:
    """Families in turn, that of the best trial so far every other time: the first, the second, the first, the third."""
    found: list[tuple[Family, float]] = []
    queues = [list(line) for line in lines]
    while any(queues):
        others = [queue for queue in queues[1:] if queue]
        for queue in others or queues[:1]:
            found += [some.pop(0) for some in (queues[0], queue) if some]
    return found


def _is_beaten(family: Family, trials: Sequence[Measured], goal: Goal, table: Table) -> bool:
    """Whether the family can hardly become the cheapest: what of it was not good, or two steps further, costs more.

    What rounding alone can come to is known: nothing less beats it, and nothing that is hardly more was bad.
    """
    if goal.budget is not None:
        return goal.cost != "bytes" and _loses_more(family, trials, goal)
    built = [trial.costs[goal.cost] for trial in trials if trial.family == family and trial.costs]
    good = [trial for trial in trials if is_good(trial, goal)]
    bad = [trial for trial in trials if trial.family == family and not is_good(trial, goal) and trial.costs]
    edge = min((trial.x for trial in good if trial.family == family), default=1.0)
    below = [trial.costs[goal.cost] for trial in bad if trial.x < edge]
    if not good:
        return False
    least = min(trial.costs[goal.cost] for trial in good)
    if family == "quantize":
        return max(below, default=0.0) >= _AIMED * least or table.least_bytes >= least
    return max(below, default=0.0) >= least or min(built, default=0.0) * _STEP**2 > least


def _loses_more(family: Family, trials: Sequence[Measured], goal: Goal) -> bool:
    """Whether another family lost less within the budget than this one did with nearly all of it, or more."""
    assert goal.budget is not None
    others = [trial.drop for trial in trials if trial.family != family and is_good(trial, goal)]
    least = min(others, default=math.inf)
    return any(
        trial.drop > least and trial.costs[goal.cost] > _USED * goal.budget
        for trial in trials
        if trial.family == family and trial.costs
    ) and all(trial.drop > least for trial in trials if trial.family == family and is_good(trial, goal))


def _openings(begin: Mapping[Family, Sequence[float]]) -> list[tuple[Family, float]]:
    depth = max((len(line) for line in begin.values()), default=0)
    return [(family, line[at]) for at in range(depth) for family, line in begin.items() if at < len(line)]


def _next(family: Family, trials: Sequence[Measured], goal: Goal, table: Table) -> list[float]:
    """Places in one family that are worth a trial, the most promising first.

    For a limit of the drop small x are wanted and large ones are good; for a budget of the cost it is the other way
    round: the largest x within the budget loses least.
    """
    mine = [trial for trial in trials if trial.family == family]
    built = [trial for trial in mine if not trial.refused]
    if mine and not built:  # nothing of this kind can be done to the model
        return []
    if goal.budget is None:
        return _further_down(family, mine, trials, goal)
    good = [trial.x for trial in mine if is_good(trial, goal)]
    bad = [trial.x for trial in mine if not is_good(trial, goal)]
    if built and (near := _around_budget(family, built, goal, table)) is not None:
        return near
    edge = max(good, default=_LEAST)
    over = min((x for x in bad if x > edge), default=None)
    if over is None:
        return [x for x in (edge / _STEP**0.5, edge / _STEP) if x < 1]
    return _between(edge, over)


def _further_down(
    family: Family, mine: Sequence[Measured], trials: Sequence[Measured], goal: Goal
) -> list[float]:
    """Such places for a limit of the drop, of the family of these trials among all."""
    good = [trial.x for trial in mine if is_good(trial, goal)]
    edge = min(good, default=1.0)
    beyond = max((trial.x for trial in mine if not is_good(trial, goal) and trial.x < edge), default=None)
    if family == "quantize" and (level := _level(mine, trials, goal)) is not None:
        leaps = [x for x in (_LEAP * level, _LEAP * _STEP * level) if x > _LEAST]
        return leaps if beyond is None else _between(beyond, level)
    if beyond is None:
        steps = (1, 2, 0.5, 1.5) if family == "narrow" else (1, 2, 0.5)  # all of a round, when alone
        return [x for x in (edge * _STEP**step for step in steps) if x > _LEAST]
    above = (*_ABOVE, *_MORE_ABOVE) if family == "narrow" else _ABOVE
    return [*_between(beyond, edge), *(x for x in (edge * factor for factor in above) if good and x < 1)]


def _level(mine: Sequence[Measured], trials: Sequence[Measured], goal: Goal) -> float | None:
    """About where a family costs as much as the cheapest good trial of all; None unless its own good ones cost more."""
    costs = [trial.costs[goal.cost] for trial in trials if is_good(trial, goal)]
    good = [trial for trial in mine if is_good(trial, goal)]
    near = min(good, key=lambda trial: trial.costs[goal.cost], default=None)
    if near is None or near.costs[goal.cost] <= min(costs):
        return None
    return near.x * min(costs) / near.costs[goal.cost]


def _expected_edge(
    trials: Sequence[Measured], goal: Goal, table: Table, searched: Searched, prices: Prices
) -> float | None:
    """Where the solver expects that the drop's bound just keeps within its limit, seen from the trial that came nearest
    to that; None without such a limit, or if that place is not open, nearly tried, or dearer than what is good already.
    """
    mine = [trial for trial in trials if trial.family == "joint"]
    told = [trial for trial in mine if math.isfinite(trial.bound) and trial.bound > 0]
    if goal.cost != "bytes" or not goal.limit or not told:
        return None
    limit = goal.limit
    near = min(told, key=lambda trial: abs(math.log(trial.bound / limit)))
    x = place_of(_AIMED * limit / near.bound, near.recipe, table, searched, prices)
    good = [trial.x for trial in mine if is_good(trial, goal)]
    edge = min(good, default=1.0)
    beyond = max((trial.x for trial in mine if not is_good(trial, goal) and trial.x < edge), default=0.0)
    least = min((trial.costs["bytes"] for trial in trials if is_good(trial, goal)), default=math.inf)
    if x is None or not beyond * _CLOSE < x < edge / _CLOSE or x * table.float_bytes > least:
        return None
    return max(x, edge * _STEP**2) if good else x


def _around_budget(family: Family, built: Sequence[Measured], goal: Goal, table: Table) -> list[float] | None:
    """Places where the cost, which grows with x along a line, is just within the budget; None of another family."""
    assert goal.budget is not None
    if (family, goal.cost) == ("narrow", "latency_ms"):
        return _on_line(built, goal.cost, goal.budget)
    shares: tuple[float, ...]
    if (family, goal.cost) == ("narrow", "macs"):  # what the solver counts is nearly what is left
        whole, shares = table.macs, (1.0, 0.96, 0.9)
    elif family in ("quantize", "joint") and goal.cost == "bytes":
        # What is stored beside the weights hardly changes: the nearest trial tells how much that is.
        whole, shares = table.float_bytes, (0.997, 0.985, 0.96) if family == "quantize" else (0.98,)
    else:
        return None
    near = min(built, key=lambda trial: abs(trial.costs[goal.cost] - goal.budget))  # type: ignore[operator]
    room = [share * goal.budget - near.costs[goal.cost] for share in shares]
    return [x for x in (near.x + some / whole for some in room) if 0 < x < 1]


def _on_line(built: Sequence[Measured], cost: str, budget: float) -> list[float] | None:
    """The same of a cost that is measured, beside what does not shrink: on the line through all trials, if it rises."""
    places, costs = [trial.x for trial in built], [trial.costs[cost] for trial in built]
    if len(set(places)) < _LINE:
        return None
    slope, height = np.polyfit(places, costs, 1)
    if slope <= 0:
        return None
    found = [float((share * budget - height) / slope) for share in (0.97, 0.9)]
    return [x for x in found if _LEAST < x < 1] or None


def _between(low: float, high: float) -> list[float]:
    """Places between two x, the middle first."""
    if high / low < _CLOSE:
        return []
    return [low ** (1 - share) * high**share for share in (0.5, 0.75, 0.25)]
