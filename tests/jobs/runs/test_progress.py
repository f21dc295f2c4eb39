"""A run as it stands: what its events add up to, and how a summary tells it."""

import json

import pytest

from fleetpress.jobs.runs.events import Event
from fleetpress.jobs.runs.progress import Progress
from fleetpress.jobs.runs.results import (
    FleetResult,
    read_result,
    summary_key,
    write_summary,
)
from fleetpress.storage.errors import ArtifactCorrupt
from fleetpress.storage.store import ObjectStore


class Clock:
    """Seconds as a test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    """Five tasks of one step, ten seconds after the start: two have ended, one of them badly, and one runs."""
    made = Progress(run="r", started=clock.now, executor="ray", clock=clock)
    made.tasks, made.left = 5, {"train": 4}
    for index, (kind, moved) in enumerate((("finished", 100), ("retry", 10))):
        task = {"model": f"m{index}", "task": f"m{index}/train", "step": "train"}
        made.note(Event(kind="started", **task), 0.0)
        made.note(Event(kind=kind, **task, seconds=5.0, bytes_read=moved, bytes_written=1), 5.0)
    made.note(Event(kind="started", model="m2", task="m2/train", step="train"), 5.0)
    clock.now += 10
    return made


def test_events_add_up(progress: Progress) -> None:
    found = progress.standing()
    assert (found.executor, found.tasks_total, found.tasks_left, found.tasks_running) == ("ray", 5, 4, 1)
    assert (found.bytes_read, found.bytes_written, found.retries) == (110, 2, 1)
    assert [vars(task) for task in found.running] == [{"model": "m2", "task": "train", "seconds": 5.0}]
    assert found.seconds_left == 10.0  # three more of five seconds: 15 seconds of work in 10 seconds so far
    assert not found.seconds_left_is_least


def test_a_summary_names_some_of_the_tasks_that_run(progress: Progress) -> None:
    for index in range(1000):
        progress.note(Event(kind="started", model=f"x{index}", task=f"x{index}/train", step="train"), 6.0)
    found = progress.standing()
    assert (found.tasks_running, len(found.running)) == (1001, 50)


def test_events_of_models_are_no_tasks(progress: Progress) -> None:
    before = progress.standing()
    progress.note(Event(kind="published", model="m2"), 9.0)
    assert progress.standing() == before


def fleet(progress: Progress) -> FleetResult:
    return FleetResult(run="r", state="running", name="n", output="o", models=(), **vars(progress.standing()))


def test_a_summary_tells_how_a_run_stands(store: ObjectStore, progress: Progress) -> None:
    written = fleet(progress)
    write_summary(store, written)
    assert read_result(store, "r") == written
    over = written.ended("interrupted")
    assert (over.state, over.running, over.tasks_running, over.seconds_left) == ("interrupted", (), 0, None)
    assert (over.tasks_left, over.bytes_read) == (4, 110)


def test_summaries_of_other_versions_are_read(store: ObjectStore, progress: Progress) -> None:
    told = {
        "run": "r",
        "state": "done",
        "name": "n",
        "output": "o",
        "seconds": 1.0,
        "warnings": [],
        "models": [],
    }
    store.put(summary_key("r"), json.dumps(told).encode())
    assert read_result(store, "r") == FleetResult(
        run="r", state="done", name="n", output="o", seconds=1.0, models=()
    )
    newer = fleet(progress).as_dict() | {"something": "new"}
    store.put(summary_key("r"), json.dumps(newer).encode())
    assert read_result(store, "r") == fleet(progress)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bytes_read", "1"),
        ("executor", 1),
        ("seconds_left", "soon"),
        ("running", [1]),
        ("running", [{"task": "t"}]),
    ],
)
def test_a_damaged_summary_is_told(store: ObjectStore, progress: Progress, name: str, value: object) -> None:
    store.put(summary_key("r"), json.dumps(fleet(progress).as_dict() | {name: value}).encode())
    with pytest.raises(ArtifactCorrupt, match="no run summary"):
        read_result(store, "r")
