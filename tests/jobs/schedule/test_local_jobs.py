"""Jobs of this machine: they outlive the tick, tell of themselves in the output, and end when they are asked to."""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.schedule import attend as attending
from fleetpress.jobs.schedule import local_jobs
from fleetpress.jobs.schedule.attend import attend, job_key, log_key, stop_key
from fleetpress.jobs.schedule.file import Schedule, parse_schedules
from fleetpress.jobs.schedule.local_jobs import LOST_SECONDS, LocalLauncher
from fleetpress.jobs.schedule.records import LocalJob, read_record, record_bytes
from fleetpress.storage.store import ObjectStore, open_store

JOB = "s-20260301T023000Z"
SAYS_AND_ENDS = [sys.executable, "-c", "print('hello'); raise SystemExit(3)"]
WAITS = [
    sys.executable,
    "-c",
    "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
    "print('up', flush=True)\ntime.sleep(60)",
]


def schedule(options: str = "") -> Schedule:
    entry = f'{{name: s, spec: fleet.yaml, cron: "@daily", executor: inline{options}}}'
    return parse_schedules(f"version: 1\noutput: o\nschedules: [{entry}]\n", "s.yaml").schedules[0]


class FakeCommand(LocalLauncher):
    """Begins a command of the test's own instead of `fleetpress run`."""

    command = SAYS_AND_ENDS

    def _command(self, spec: str) -> list[str]:
        return self.command


@pytest.fixture
def place(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "output"))


def until(wanted: Callable[[], bool], seconds: float = 60.0) -> None:
    ends_at = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < ends_at, "it took too long"
        time.sleep(0.05)


def test_a_job_is_begun_once_and_tells_of_its_end_and_its_last_words(place: ObjectStore) -> None:
    launcher = FakeCommand(place, schedule())
    assert launcher.state(JOB) == "unknown"
    launcher.launch("fleet.yaml", JOB)
    assert launcher.state(JOB) in ("pending", "running", "failed")
    launcher.launch("fleet.yaml", JOB)  # joins
    until(lambda: log_key(JOB) in place.sizes("schedules/"))
    assert place.get(log_key(JOB)) == b"hello\n"
    assert LocalLauncher(place, schedule()).state(JOB) == "failed"
    record = read_record(place, job_key(JOB), LocalJob)
    assert record is not None
    assert (record.phase, record.exit_code) == ("ended", 3)


def test_two_launches_in_the_same_second_are_one_process(
    place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(local_jobs.subprocess, "Popen", lambda words, **_: begun.append(words))
    launcher = FakeCommand(place, schedule(), clock=lambda: datetime(2026, 3, 1, 2, 30, tzinfo=UTC))
    launcher.launch("fleet.yaml", JOB)
    launcher.launch("fleet.yaml", JOB)
    assert len(begun) == 1


def test_a_job_of_this_machine_stops_at_once(place: ObjectStore) -> None:
    launcher = FakeCommand(place, schedule())
    launcher.command = WAITS
    launcher.launch("fleet.yaml", JOB)
    until(lambda: launcher.state(JOB) == "running")
    launcher.stop(JOB)
    until(lambda: launcher.state(JOB) == "stopped", 30)


def test_a_job_of_another_machine_stops_with_its_next_beat(
    place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "BEAT_SECONDS", 0.2)
    place.put(stop_key(JOB), b"stop\n")
    assert attend(place, JOB, WAITS, deadline_seconds=None) == 130
    assert LocalLauncher(place, schedule()).state(JOB) == "stopped"


def test_a_job_keeps_its_deadline_itself(place: ObjectStore) -> None:
    assert attend(place, JOB, WAITS, deadline_seconds=0.5) == 130
    record = read_record(place, job_key(JOB), LocalJob)
    assert record is not None
    assert record.reason == "over its deadline of 0.5 s"


def test_sigterm_of_the_attendant_ends_the_job_in_good_order(
    place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray and systemd stop a job that is worked on in the foreground this way."""
    tell = attending._Attended.tell

    def then_terminate(self: attending._Attended, *, phase: str, exit_code: int = 0) -> None:
        tell(self, phase=phase, exit_code=exit_code)
        if phase == "running":
            until(lambda: b"up" in words.read_bytes())
            os.kill(os.getpid(), signal.SIGTERM)

    words = Path(place.uri).parent / "words"
    words.touch()
    waits = [
        WAITS[0],
        WAITS[1],
        WAITS[2].replace("print('up', flush=True)", f"open({str(words)!r}, 'w').write('up')"),
    ]
    monkeypatch.setattr(attending._Attended, "tell", then_terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert attend(place, JOB, waits, deadline_seconds=None) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_cannot_be_begun_fails(place: ObjectStore) -> None:
    assert attend(place, JOB, ["/nowhere/fleetpress"], deadline_seconds=None) == 1
    record = read_record(place, job_key(JOB), LocalJob)
    assert record is not None
    assert record.reason == "cannot be begun: No such file or directory"


def test_a_job_that_shows_no_sign_of_life_is_lost(place: ObjectStore) -> None:
    now = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
    launcher = LocalLauncher(place, schedule(), clock=lambda: now)
    sign = LocalJob(job=JOB, phase="running", host="elsewhere", process=1, beat_at="20260301T025900Z")
    place.put(job_key(JOB), record_bytes(sign))
    assert launcher.state(JOB) == "running"
    launcher.stop(JOB)  # of another machine: no process of ours is touched
    now += timedelta(seconds=LOST_SECONDS)
    assert launcher.state(JOB) == "failed"


def test_a_job_whose_process_never_came_up_is_begun_again(place: ObjectStore) -> None:
    sign = LocalJob(job=JOB, phase="starting", host="elsewhere", process=1, beat_at="20260301T023000Z")
    place.put(job_key(JOB), record_bytes(sign))
    FakeCommand(place, schedule(), clock=lambda: datetime(2026, 3, 1, 2, 31, tzinfo=UTC)).launch("a", JOB)
    assert read_record(place, job_key(JOB), LocalJob) == sign
    FakeCommand(place, schedule()).launch("a", JOB)
    until(lambda: log_key(JOB) in place.sizes("schedules/"))


def test_a_machine_that_can_start_no_process_says_so_and_may_try_again(
    place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    launcher = FakeCommand(place, schedule())
    with pytest.raises(UsageError, match=f"no process could be started for {JOB}: No such file or directory"):
        launcher.launch("fleet.yaml", JOB)
    assert launcher.state(JOB) == "unknown"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ["run", "a.yaml", "--executor", "inline"]),
        (", allow_code: true", ["run", "a.yaml", "--executor", "inline", "--allow-code"]),
    ],
)
def test_the_command_is_fleetpress_run(place: ObjectStore, options: str, words: list[str]) -> None:
    assert LocalLauncher(place, schedule(options))._command("a.yaml")[3:] == words


def test_a_cluster_to_join_is_named(place: ObjectStore) -> None:
    joining = schedule().model_copy(update={"address": "head:6379", "executor": "ray"})
    assert LocalLauncher(place, joining)._command("a.yaml")[3:] == ["run", "a.yaml", "--address", "head:6379"]
