"""Which of the measured trials are good, in which order, and their front."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from example_trials import SMALLEST, told, trials

from fleetpress.jobs.auto.ladder import ladder
from fleetpress.jobs.auto.measured import (
    front,
    is_good,
    measured_in,
    ranked,
    refusals,
)


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
