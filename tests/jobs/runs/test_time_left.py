"""How long a run still takes, as far as its own tasks tell."""

import pytest

from fleetpress.jobs.runs.time_left import Pace


def test_nothing_is_said_before_a_task_has_ended() -> None:
    pace = Pace()
    assert pace.left(5.0, {"train": 3}, []) == (None, False)
    pace.began(1.0)
    assert pace.left(5.0, {"train": 3}, [("train", 1.0)]) == (None, False)


def test_means_of_steps_at_the_speed_so_far() -> None:
    pace = Pace()
    pace.began(0.0)
    for _ in range(4):  # two at a time, ten seconds each
        pace.ended("train", 10.0, done=True)
    seconds, is_least = pace.left(20.0, {"train": 6, "publish": 0}, [])
    assert seconds == pytest.approx(30.0)
    assert not is_least


def test_what_runs_is_partly_done() -> None:
    pace = Pace()
    pace.began(0.0)
    pace.ended("train", 10.0, done=True)
    seconds, _ = pace.left(14.0, {"train": 2}, [("train", 10.0)])
    assert seconds == pytest.approx(16.0)
    late, _ = pace.left(50.0, {"train": 1}, [("train", 10.0)])  # far over its time: any moment now
    assert late == 0.0


def test_a_step_that_was_never_seen_makes_it_a_lower_bound() -> None:
    pace = Pace()
    pace.began(0.0)
    pace.ended("train", 10.0, done=True)
    seconds, is_least = pace.left(10.0, {"train": 1, "publish": 1}, [])
    assert seconds == pytest.approx(10.0)
    assert is_least


def test_failed_tries_slow_a_run_down_and_tell_nothing_of_the_step() -> None:
    pace = Pace()
    pace.began(0.0)
    pace.ended("train", 5.0, done=False)
    assert pace.left(5.0, {"train": 1}, []) == (None, False)
    pace.ended("train", 10.0, done=True)
    assert pace.left(15.0, {"train": 1}, [])[0] == pytest.approx(10.0)
