"""Jobs through a cluster's Jobs API: the fire's own id, taken once; the job server is played here."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.errors import ClusterUnreachable
from fleetpress.jobs.executors.job_state import JobState
from fleetpress.jobs.schedule.cluster_jobs import ClusterLauncher
from fleetpress.jobs.schedule.file import load_schedules
from fleetpress.jobs.schedule.launching import launcher_of
from fleetpress.jobs.schedule.tick import Tick, tick
from fleetpress.storage.store import open_store

JOB = "s-20260301T023000Z"
SPEC = """\
version: 1
name: fleet
output: s3://bucket/out
models: [{source: "s3://bucket/in/net.pt2", recipe: w4}]
recipes: {w4: {quantize: {scheme: W4A16}}}
"""
FILE = """\
version: 1
output: "{place}/output"
schedules:
  - {{name: s, spec: fleet.yaml, cron: "30 2 * * *", address: "http://head:8265", deadline: 1h}}
"""


class PlayedServer:
    """A job server that takes an id once."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobState] = {}
        self.submitted: list[str] = []
        self.addresses: set[str] = set()
        self.address = ""
        self.is_down = False

    def __call__(self, address: str) -> "PlayedServer":
        if self.is_down:
            raise ClusterUnreachable(f"no job server answers at {address}")
        self.addresses.add(address)
        return self

    def versions(self) -> Mapping[str, str]:
        return {"ray": "2.60.0", "python": "3.12.1"}

    def state(self, job: str) -> JobState | None:
        return self.jobs.get(job)

    def submit(self, job: str, _entrypoint: str, **_: Any) -> bool:
        if job in self.jobs:
            return False
        self.submitted.append(job)
        self.jobs[job] = JobState(job=job, state="running")
        return True

    def stop(self, job: str) -> bool:
        self.jobs[job] = JobState(job=job, state="stopped")
        return True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> PlayedServer:
    played = PlayedServer()
    monkeypatch.setattr("fleetpress.jobs.executors.ray_jobs.JobServer", played)
    return played


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "fleet.yaml").write_text(SPEC)
    (tmp_path / "schedules.yaml").write_text(FILE.format(place=tmp_path))
    return str(tmp_path / "schedules.yaml")


def test_a_spec_is_submitted_once_under_the_fire_s_id(server: PlayedServer, path: str) -> None:
    file = load_schedules(path)
    launcher = launcher_of(file.schedules[0], open_store(file.output))
    assert isinstance(launcher, ClusterLauncher)
    assert launcher.state(JOB) == "unknown"
    for _ in range(2):
        launcher.launch(file.schedules[0].spec, JOB)
    assert server.submitted == [JOB]
    assert server.addresses == {"http://head:8265"}
    assert launcher.state(JOB) == "running"
    launcher.stop(JOB)
    assert launcher.state(JOB) == "stopped"


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("pending", None, "pending"),
        ("succeeded", 0, "succeeded"),
        ("failed", 3, "failed"),
        ("failed", None, "failed"),
        ("failed", 130, "stopped"),
        ("stopped", None, "stopped"),
    ],
)
def test_states(server: PlayedServer, path: str, state: str, code: int | None, expected: str) -> None:
    server.jobs[JOB] = JobState(job=JOB, state=state, driver_exit_code=code)
    assert ClusterLauncher(load_schedules(path).schedules[0]).state(JOB) == expected


def test_ticks_submit_watch_and_stop(server: PlayedServer, path: str) -> None:
    file = load_schedules(path)

    def at(hour: int, minute: int) -> list[str]:
        how = Tick(now=datetime(2026, 3, 1, hour, minute, tzinfo=UTC), by="test")
        return [row.action for row in tick(file, how).rows]

    server.is_down = True
    assert at(2, 30) == ["failed"]
    server.is_down = False
    assert at(2, 31) == ["begun", "waiting"]
    assert at(2, 32) == ["running", "waiting"]
    assert at(3, 32) == ["stopped", "waiting"]
    assert at(3, 33) == ["waiting"]
    assert server.submitted == [JOB]
