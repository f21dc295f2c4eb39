"""Which of the measured trials are good, which are tried for publishing and in which order, and their front."""

import math
from collections.abc import Iterable
from dataclasses import replace

from fleetpress.jobs.auto.measured import (
    Goal,
    Measured,
    front,
    is_good,
    ladder,
    measured_in,
    ranked,
    refusals,
)

SMALLEST = Goal(goal="smallest", cost="bytes", limit=0.01)


def trials(drops_and_bytes: Iterable[tuple[float, float]]) -> list[Measured]:
    return [
        Measured(
            digest=f"{index}",
            family="quantize",
            x=0.1 + 0.01 * index,
            recipe={},
            before=0.9,
            after=0.9 - drop,
            drop=drop,
            standard_error=0.001,
            costs={"bytes": cost},
        )
        for index, (drop, cost) in enumerate(drops_and_bytes)
    ]


def told(some: Iterable[Measured]) -> list[tuple[float, float]]:
    return [(trial.drop, trial.costs["bytes"]) for trial in some]


def test_the_ladder_goes_from_the_best_to_what_is_safer() -> None:
    found = trials([(0.5, 10), (0.0095, 20), (0.008, 30), (0.0085, 25), (0.0, 100), (math.nan, 5)])
    # 0.0095 and its standard error are over the limit.
    assert told(ladder(found, SMALLEST)) == [(0.0085, 25), (0.008, 30), (0.0, 100)]


def test_the_ladder_goes_on_where_nothing_was_lost() -> None:
    """On few samples many trials lose nothing; what passes there need not pass elsewhere."""
    found = trials((0.0, cost) for cost in (10, 10.5, 14, 30))
    assert told(ladder(found, SMALLEST)) == [(0.0, 10), (0.0, 14), (0.0, 30)]


def test_only_trials_within_the_budget_are_published_if_there_are_any() -> None:
    goal = Goal(goal="most_accurate", cost="bytes", budget=50)
    found = trials((1 / share, 15.0 * share) for share in range(1, 6))
    assert [cost for _, cost in told(ladder(found, goal))] == [45, 30, 15]


def test_the_least_bad_trial_is_published_where_none_is_within_the_budget() -> None:
    goal = Goal(goal="most_accurate", cost="bytes", budget=5)
    assert told(ladder(trials([(0.1, 30), (0.3, 10)]), goal)) == [(0.3, 10)]


def test_the_front_holds_what_no_other_beats_both_ways() -> None:
    found = trials([(3, 1), (2, 2), (2.5, 3), (1, 4)])
    assert told(front(found, "bytes")) == [(3, 1), (2, 2), (1, 4)]


def test_what_cannot_be_built_is_neither_good_nor_published() -> None:
    facts = {"family": "delete", "x": 0.6, "recipe": {}, "refused": "no unit can be deleted"}
    (refused,) = measured_in("d", facts)
    (built,) = trials([(0.0, 40)])
    assert not is_good(refused, SMALLEST)
    assert ranked([refused, built], SMALLEST) == [built]
    assert front([refused, built], "bytes") == ladder([refused, built], SMALLEST) == [built]


def test_a_trial_that_had_nothing_to_try_tells_nothing() -> None:
    assert measured_in("d", {"skipped": "no other candidate is worth a trial"}) == []


def test_reasons_of_refused_candidates_are_told_once_each() -> None:
    tried = [
        replace(trial, refused=why)
        for trial, why in zip(trials([(0.1, 1)] * 4), ["", "a", "b", "a"], strict=True)
    ]
    assert refusals(tried) == ["3 of 4 candidates of the search could not be built: a; b"]
    assert refusals(tried[:1]) == []
