"""Scheduled runs from end to end: a process of its own for each fire, and the second finds nothing to do."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.runs.results import read_result, run_ids
from fleetpress.jobs.schedule.attend import log_key
from fleetpress.jobs.schedule.claims import Claims
from fleetpress.jobs.schedule.file import load_schedules
from fleetpress.jobs.schedule.tick import Tick, TickResult, tick
from fleetpress.jobs.spec.fleet_spec import Spec
from fleetpress.storage.store import ObjectStore, open_store

SPEC = """\
version: 1
name: fleet
output: {place}/output
models:
  - {{source: "{place}/models/*.pt2", recipe: small}}
recipes:
  small: {{quantize: {{scheme: W8A16}}}}
"""
SCHEDULES = """\
version: 1
output: "{place}/output"
schedules:
  - {{name: nightly, spec: spec.yaml, cron: "* * * * *", executor: inline}}
"""


@pytest.fixture
def place(tmp_path: Path, fleet_at: Callable[..., Spec]) -> Path:
    """A fleet, its spec and a schedule that fires every minute."""
    fleet_at(tmp_path, SPEC)
    (tmp_path / "spec.yaml").write_text(SPEC.format(place=tmp_path))
    (tmp_path / "schedules.yaml").write_text(SCHEDULES.format(place=tmp_path))
    return tmp_path


def ended(store: ObjectStore, job: str, seconds: float = 200.0) -> str:
    """The log of a job, once it has ended."""
    ends_at = time.monotonic() + seconds
    while log_key(job) not in store.sizes("schedules/"):
        assert time.monotonic() < ends_at, "the job does not end"
        time.sleep(0.2)
    return store.get(log_key(job)).decode()


def test_a_second_scheduled_run_finds_everything_unchanged_and_begins_nothing_twice(place: Path) -> None:
    file = load_schedules(str(place / "schedules.yaml"))
    store = open_store(str(place / "output"))
    first_fire = datetime.now(UTC).replace(second=0, microsecond=0)

    def at(minute: int, second: int) -> TickResult:
        return tick(file, Tick(now=first_fire + timedelta(minutes=minute, seconds=second), by="test"))

    (begun,) = at(0, 5).rows
    assert begun.action == "begun"
    assert [row.action for row in at(0, 6).rows] == ["running", "waiting"]
    log = ended(store, begun.job)
    assert "2 published" in log, log
    artifacts = store.sizes("models/")
    over, again = at(1, 0).rows
    assert (over.action, over.reason) == ("ended", "succeeded")
    assert again.action == "begun"
    assert "2 unchanged" in ended(store, again.job)
    assert [row.action for row in at(1, 30).rows] == ["ended", "waiting"]
    assert [row.action for row in at(1, 31).rows] == ["waiting"]

    runs = [read_result(store, run) for run in run_ids(store)]
    assert [{model.state for model in run.models} for run in runs] == [{"published"}, {"unchanged"}]
    assert store.sizes("models/") == artifacts
    assert len([key for key in store.sizes("schedules/nightly/jobs/") if key.endswith(".json")]) == 2
    claims = Claims(store, "nightly")
    assert [claims.claim(first_fire + timedelta(minutes=minute)).state for minute in (0, 1)] == [
        "succeeded"
    ] * 2  # type: ignore[union-attr]


def test_in_the_foreground_the_exit_code_is_the_run_s(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "models" / "broken.pt2").write_bytes(b"no model")
    words = ["schedule", "tick", str(place / "schedules.yaml"), "--foreground", "--only", "nightly", "--json"]
    assert main(words) == 3
    out, err = capfd.readouterr()
    assert [row["action"] for row in json.loads(out)["rows"]][:2] == ["begun", "ended"]
    assert "1 failed, 2 published" in err
    assert len(run_ids(open_store(str(place / "output")))) == 1
