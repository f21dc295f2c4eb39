"""What is published one after the other until something passes: what was tried, and what lies between."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from example_trials import SMALLEST, told, trials

from fleetpress.jobs.auto.ladder import between, ladder
from fleetpress.jobs.auto.measured import Goal


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


def test_between_rungs_far_apart_others_are_made_in_equal_steps_of_cost() -> None:
    found = trials([(0.05, 60), (0.008, 100), (0.002, 126), (0.001, 300)])
    places = between(*found[1:3], found, SMALLEST)
    assert [family for family, _ in places] == ["quantize"] * 5
    assert [x for _, x in places] == pytest.approx([0.1 * 1.26 ** (step / 6) for step in range(1, 6)])


def test_what_is_made_between_is_of_the_family_that_is_expected_to_lose_least_there() -> None:
    lower, upper = trials([(0.008, 100), (0.006, 150)], "joint")
    others = trials([(0.2, 70), (0.004, 130), (0.003, 160)])
    # Rounding loses 0.014 at 107, 0.009 at 114 and 0.006 at 122, the other family between 0.008 and 0.006.
    families = [family for family, _ in between(lower, upper, [lower, upper, *others], SMALLEST)]
    assert families == ["joint"] * 2 + ["quantize"] * 3
    dear = trials([(0.5, 90), (0.3, 160)], "delete")
    assert between(lower, upper, [lower, upper, *others, *dear], SMALLEST) == between(
        lower, upper, [lower, upper, *others], SMALLEST
    )


def test_nothing_is_made_between_rungs_that_are_close_or_of_which_one_is_not_dearer() -> None:
    close = trials([(0.008, 100), (0.002, 105)])
    assert between(*close, close, SMALLEST) == []
    cheaper = trials([(0.008, 100), (0.002, 50)])
    assert between(*cheaper, cheaper, SMALLEST) == []


def test_nothing_is_made_between_that_is_expected_to_lose_more_than_what_failed() -> None:
    lower, upper = trials([(0.004, 100)]) + trials([(0.001, 200)], "joint")
    others = trials([(0.9, 90), (0.4, 220)], "delete")
    assert between(lower, upper, [lower, upper, *others], SMALLEST) == []


def test_where_nothing_was_lost_the_family_of_what_is_dearer_is_made_between() -> None:
    """So it is on few samples, and with a limit of nothing at all."""
    joint, plain = trials([(0.0, 100), (0.0, 200)], "joint"), trials([(0.0, 90), (0.0, 210)])
    for goal in (SMALLEST, replace(SMALLEST, limit=0.0)):
        places = between(joint[0], plain[1], [*joint, *plain], goal)
        assert [family for family, _ in places] == ["quantize"] * 5


def test_candidates_that_were_not_built_tell_nothing_of_what_lies_between() -> None:
    found = trials([(0.008, 100), (0.002, 200)])
    refused = [replace(trial, refused="diverged", drop=math.inf, costs={}) for trial in trials([(0.1, 140)])]
    assert between(*found, [*found, *refused], SMALLEST) == between(*found, found, SMALLEST)


def test_nothing_is_made_between_where_the_cost_is_bounded() -> None:
    found = trials([(0.001, 45), (0.002, 10)])
    assert between(*found, found, Goal(goal="most_accurate", cost="bytes", budget=50)) == []
