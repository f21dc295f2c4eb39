"""Jobs as an output keeps them, what their ends mean, and the log of a run without its cluster."""

import json
from dataclasses import replace

import pytest

from fleetpress.jobs.driver.job_records import (
    JobRecord,
    jobs_in,
    read_job,
    run_of,
    write_job,
)
from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.executors.job_state import JobState, valid_job
from fleetpress.jobs.runs.results import (
    FleetResult,
    ModelResult,
    RunState,
    write_summary,
)
from fleetpress.jobs.runs.run_log import (
    follow_run,
    kept_log,
    line_of,
)
from fleetpress.storage.errors import ArtifactCorrupt, ObjectNotFound
from fleetpress.storage.store import ObjectStore

RUN = "20261130T022613148Z-d9952b"
JOB = JobRecord(job="fleetpress-nightly-35db27010a6f", address="http://head:8265", run=RUN)


def test_a_job_leads_to_its_run(store: ObjectStore) -> None:
    write_job(store, JOB)
    assert read_job(store, JOB.job) == JOB
    assert run_of(store, JOB.job) == RUN
    assert run_of(store, RUN) == RUN
    assert run_of(store, None) is None
    assert run_of(store, "neither") == "neither"
    assert run_of(store, "../neither") == "../neither"
    write_job(store, replace(JOB, job="before", run=None, exit_code=2))
    with pytest.raises(ObjectNotFound, match="job before ended with exit code 2 before it began a run"):
        run_of(store, "before")
    assert [record.job for record in jobs_in(store)] == ["before", JOB.job]


@pytest.mark.parametrize(
    "told",
    [b"", b"{", b"[]", b'{"job": "broken"}', b'{"job": "broken", "address": 1}', b'{"job": "x", "address": ""}',
     b'{"job": "broken", "address": "", "run": 7}', b'{"job": "broken", "address": "", "more": 1}'],
)  # fmt: skip
def test_what_is_no_record_is_named(store: ObjectStore, told: bytes) -> None:
    store.put("jobs/broken.json", told)
    with pytest.raises(ArtifactCorrupt, match=r"jobs/broken\.json is no record of a job"):
        read_job(store, "broken")


@pytest.mark.parametrize(
    ("state", "left_with", "code"),
    [("running", None, None), ("pending", None, None), ("succeeded", 0, 0), ("succeeded", None, 0),
     ("failed", 3, 3), ("failed", 4, 4), ("failed", 130, 130), ("failed", -15, 130), ("failed", -9, 5),
     ("failed", 127, 5), ("failed", None, 5), ("stopped", None, 130), ("stopped", -9, 130)],
)  # fmt: skip
def test_exit_codes_are_those_of_run(state: str, left_with: int | None, code: int | None) -> None:
    told = JobState(job="job", state=state, driver_exit_code=left_with)
    assert told.exit_code == code
    assert told.is_over == (code is not None)
    assert told.as_dict()["exit_code"] == code


def test_ids_of_jobs_are_plain_names() -> None:
    assert valid_job("a.B_c-1") == "a.B_c-1"
    with pytest.raises(UsageError, match="cannot be a job's id"):
        valid_job("a/b")


def summary(store: ObjectStore, state: RunState, *models: ModelResult) -> None:
    write_summary(store, FleetResult(run=RUN, state=state, name="n", output="o", models=models, job=JOB.job))


def test_the_log_is_that_of_the_events_or_as_far_as_the_run_has_come(store: ObjectStore) -> None:
    summary(store, "running", ModelResult(name="a", state="running"), ModelResult(name="b", state="pending"))
    assert [line_of(event) for event in kept_log(store)] == ["0.0s a running"]
    events = (
        {"at_seconds": 1.25, "kind": "finished", "model": "a", "task": "a/prune", "seconds": 0.5},
        {"at_seconds": 2.0, "kind": "failed", "model": "b", "text": "no\nlayer \x1b[31m"},
    )
    lines = b"".join(json.dumps(event).encode() + b"\n" for event in events)
    store.put(f"runs/{RUN}/events.jsonl", lines + b'7\n{"torn')
    told = [line_of(event) for event in kept_log(store, RUN)]
    assert told[0] == "1.2s a prune finished (0.5 s)"
    assert told[1].startswith("2.0s b failed: no")
    assert told[1].isprintable()
    assert len(told) == 2


def test_following_a_run_tells_what_is_new_until_it_ends(store: ObjectStore) -> None:
    a, b = ModelResult(name="a", state="running"), ModelResult(name="b", state="pending")
    stages: list[tuple[RunState, ModelResult]] = [
        ("running", replace(a, state="published")),
        ("done", replace(b, state="rejected", reason="too much lost")),
    ]
    summary(store, "running", a, b)
    seen: list[str] = []

    def sleep(_seconds: float) -> None:
        state, model = stages.pop(0)
        rows = {"a": replace(a, state="published"), "b": b, model.name: model}
        summary(store, state, *rows.values())

    store.put(f"runs/{RUN}/alive.json", b"{}")
    result = follow_run(store, RUN, seen.append, sleep=sleep)
    assert seen == ["0.0s a running", "0.0s a published", "0.0s b rejected: too much lost"]
    assert (result.exit_code, result.job) == (3, JOB.job)


def test_a_dead_run_is_not_followed_without_end(store: ObjectStore) -> None:
    summary(store, "running", ModelResult(name="a", state="running"))
    times = iter(range(0, 10_000, 4))
    result = follow_run(store, RUN, str, clock=lambda: float(next(times)), sleep=lambda _: None)
    assert result.state == "running"
