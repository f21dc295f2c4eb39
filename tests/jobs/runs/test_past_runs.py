"""Which earlier run a later one is compared with, and what finding it costs."""

from dataclasses import replace

import pytest

from fleetpress.jobs.runs.past_runs import look_back, rows_of
from fleetpress.jobs.runs.results import (
    FleetResult,
    ModelResult,
    write_summary,
)
from fleetpress.storage.store import ObjectStore

ROWS = (
    ModelResult(name="good", state="published", digest="d"),
    ModelResult(name="bad", state="failed", reason="x"),
)
RESULT = FleetResult(run="r", state="done", name="nightly", output="o", models=ROWS)


@pytest.fixture
def runs(store: ObjectStore) -> ObjectStore:
    for number, (state, name) in enumerate(
        [("done", "nightly"), ("done", "weekly"), ("interrupted", "nightly"), ("running", "nightly")]
    ):
        write_summary(store, replace(RESULT, run=f"r{number}", state=state, name=name))  # type: ignore[arg-type]
    return store


def test_the_latest_that_ended_and_the_latest_of_the_spec_that_was_not_interrupted(runs: ObjectStore) -> None:
    past = look_back(runs, "nightly")
    assert past.ended is not None
    assert past.done is not None
    assert (past.ended.run, past.done.run, past.reads) == ("r2", "r0", 4)


def test_only_runs_before_this_one(runs: ObjectStore) -> None:
    past = look_back(runs, "weekly", "r2")
    assert past.done is not None
    assert (past.done.run, past.reads) == ("r1", 1)
    assert look_back(runs, "nightly", "r0").reads == 0


def test_mostly_one_summary_is_read(store: ObjectStore) -> None:
    for number in range(40):
        write_summary(store, replace(RESULT, run=f"r{number:02}"))
    assert look_back(store, "nightly").reads == 1
    other = look_back(store, "another spec of the same output")
    assert (other.done, other.reads) == (None, 10)


def test_what_cannot_be_read_is_passed_over(runs: ObjectStore) -> None:
    runs.put("runs/r2/summary.json", b"torn")
    past = look_back(runs, "nightly")
    assert past.ended is not None
    assert past.ended.run == "r1"


def test_rows_of_published_models() -> None:
    assert rows_of(RESULT) == {"good": ROWS[0]}
    assert rows_of(None) == {}
