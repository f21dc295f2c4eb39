"""Ticks at the same moment: one job a fire, by threads, by processes, and on a store that ignores conditions."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.schedule.claims import Claims
from fleetpress.jobs.schedule.file import parse_schedules
from fleetpress.jobs.schedule.tick import Tick, TickResult, tick
from fleetpress.storage.store import ObjectStore, open_store

Make = Callable[[str], Any]
NOW = datetime(2026, 3, 1, 2, 30, tzinfo=UTC)
FILE = """\
version: 1
output: "{place}"
schedules:
  - {{name: s, spec: fleet.yaml, cron: "30 2 * * *"}}
"""
# A process that ticks as soon as it is told to, with jobs that leave a mark of their own in the store.
TICK_ONCE = """
import sys
from datetime import UTC, datetime
from fleetpress.jobs.schedule.file import parse_schedules
from fleetpress.jobs.schedule.tick import Tick, tick
from fleetpress.storage.store import open_store

class Marks:
    def launch(self, spec, job_id):
        open_store(sys.argv[2]).put(f"begun/{job_id}/{sys.argv[3]}", b"1")
    def state(self, job_id):
        return "running"

file = parse_schedules(sys.argv[1], "s.yaml")
how = Tick(now=datetime(2026, 3, 1, 2, 30, tzinfo=UTC), by=sys.argv[3], launcher_of=lambda *_: Marks())
print("ready", flush=True)
sys.stdin.readline()
print(*(row.action for row in tick(file, how).rows))
"""


class Marks:
    """A launcher that counts, whatever the id, how often it was told to begin a job."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._lock = threading.Lock()

    def launch(self, _spec: str, job_id: str) -> None:
        with self._lock:
            self.begun.append(job_id)

    def state(self, _job_id: str) -> str:
        return "running"

    def stop(self, _job_id: str) -> None:
        raise AssertionError


class Careless:
    """A store whose server takes every write: `put_if_absent` replaces what is there and says yes."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._store.put(key, data)
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def at_once(store: Any, launcher: Any, count: int) -> list[TickResult]:
    """So many ticks at the same moment."""
    file = parse_schedules(FILE.format(place=store.uri), "s.yaml")
    start = threading.Barrier(count)

    def one(number: int) -> TickResult:
        how = Tick(now=NOW, by=f"thread {number}", launcher_of=lambda *_: launcher)
        start.wait()
        return tick(file, how, store=store)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_of_ticks_in_threads_one_begins_the_job(store: ObjectStore) -> None:
    marks = Marks()
    results = at_once(store, marks, 8)
    assert marks.begun == ["s-20260301T023000Z"]
    actions = [result.rows[-1].action for result in results]
    assert actions.count("begun") == 1
    assert set(actions) <= {"begun", "skipped", "waiting"}
    assert [result.exit_code for result in results] == [0] * 8
    (job,) = Claims(store, "s").open_jobs().values()
    assert job.launched


def test_without_conditional_writes_the_job_s_id_makes_it_one(store: ObjectStore, ticker: Make) -> None:
    cluster = ticker('cron: "@daily"').cluster  # as Ray does, it begins an id once
    results = at_once(Careless(store), cluster, 8)
    assert cluster.begun == ["s-20260301T023000Z"]
    assert all(result.exit_code == 0 for result in results)


@pytest.mark.parametrize("place", ["folder", "moto"])
def test_of_ticks_in_processes_one_begins_the_job(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "output") if place == "folder" else request.getfixturevalue("s3_uri")
    text = FILE.format(place=uri)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TICK_ONCE, text, uri, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        said.append(process.communicate(timeout=60)[0].split()[-1])
    assert len(open_store(uri).sizes("begun/")) == 1, said
    assert "begun" in said


def test_forbid_holds_between_ticks_of_two_fires_at_once(ticker: Make) -> None:
    """A slow tick is about to begin its job when the next fire comes: the second sees the first, and skips."""
    hourly = ticker('cron: "* * * * *", concurrency: forbid')
    hourly.at(NOW)
    hourly.cluster.end()
    hourly.at(NOW + timedelta(seconds=30))
    launch = hourly.cluster.launch
    between: list[TickResult] = []

    def slow(spec: str, job_id: str) -> None:
        if not between:
            between.append(hourly.at(NOW + timedelta(minutes=2)))
        launch(spec, job_id)

    hourly.cluster.launch = slow
    hourly.at(NOW + timedelta(minutes=1))
    assert [row.action for row in between[0].rows] == ["skipped"]
    assert hourly.cluster.begun == ["s-20260301T023000Z", "s-20260301T023100Z"]
