"""Jobs as processes of the tick's machine: detached from it, attended by a process that tells of them in the output."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fleetpress.storage.store import ObjectStore

from ..errors import UsageError
from .attend import BEAT_SECONDS, attend, job_key, stop_key
from .file import Schedule
from .fires import stamp, unstamp
from .records import JobState, LocalJob, read_record, record_bytes

LOST_SECONDS = 18 * BEAT_SECONDS  # clocks of two machines may differ by minutes
_FLEETPRESS = "from fleetpress.jobs.cli import main; raise SystemExit(main())"
_INTERRUPTED = 130


def utc_now() -> datetime:
    """This machine's clock."""
    return datetime.now(UTC)


class LocalLauncher:
    """Runs specs with `fleetpress run` on this machine; any machine that sees the output can watch and stop them."""

    def __init__(
        self,
        store: ObjectStore,
        schedule: Schedule,
        *,
        in_foreground: bool = False,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._schedule = schedule
        self._in_foreground = in_foreground
        self._clock = clock

    def launch(self, spec: str, job_id: str) -> None:
        """See Launcher."""
        sign = LocalJob(
            job=job_id,
            phase="starting",
            host=socket.gethostname(),
            process=os.getpid(),
            beat_at=stamp(self._clock()),
            token=secrets.token_hex(8),  # to the store, the same bytes twice would be the same claim
        )
        if not self._store.put_if_absent(job_key(job_id), record_bytes(sign)):
            if not self._is_stillborn(job_id):
                return
            self._store.put(job_key(job_id), record_bytes(sign))
        deadline = self._schedule.deadline_seconds
        if self._in_foreground:
            attend(self._store, job_id, self._command(spec), deadline_seconds=deadline, is_quiet=False)
            return
        words = [sys.executable, "-m", f"{__package__}.attend", self._store.uri, job_id, str(deadline or "")]
        try:
            subprocess.Popen(
                [*words, *self._command(spec)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # it outlives the tick, and the terminal
            )
        except OSError as error:
            self._store.delete(job_key(job_id))
            raise UsageError(f"no process could be started for {job_id}: {error.strerror}") from None

    def _is_stillborn(self, job_id: str) -> bool:
        """Whether whoever began the job died before its process could say anything."""
        job = read_record(self._store, job_key(job_id), LocalJob)
        return job is not None and job.phase == "starting" and self._is_silent(job)

    def _is_silent(self, job: LocalJob) -> bool:
        return self._clock() - unstamp(job.beat_at) > timedelta(seconds=LOST_SECONDS)

    def state(self, job_id: str) -> JobState:
        """See Launcher."""
        job = read_record(self._store, job_key(job_id), LocalJob)
        if job is None:
            return "unknown"
        if job.phase == "ended":
            ends: dict[int, JobState] = {0: "succeeded", _INTERRUPTED: "stopped"}
            return ends.get(job.exit_code, "failed")
        if self._is_silent(job):
            return "failed"
        return "running" if job.phase == "running" else "pending"

    def stop(self, job_id: str) -> None:
        """See Launcher. A process of this machine hears of it at once, another one with its next beat."""
        self._store.put(stop_key(job_id), b"stop\n")
        job = read_record(self._store, job_key(job_id), LocalJob)
        if job is not None and job.phase == "running" and _is_ours(job):
            with suppress(OSError):
                os.kill(job.process, signal.SIGTERM)

    def _command(self, spec: str) -> list[str]:
        schedule = self._schedule
        words = [sys.executable, "-c", _FLEETPRESS, "run", spec]
        if schedule.executor != "ray":
            words += ["--executor", schedule.executor]
        if schedule.address and not schedule.is_submitted:
            words += ["--address", schedule.address]
        return [*words, *(["--allow-code"] if schedule.allow_code else [])]


def _is_ours(job: LocalJob) -> bool:
    """Whether the process is of this machine and still that of the job: numbers of processes are used again."""
    if job.host != socket.gethostname():
        return False
    try:
        words = Path(f"/proc/{job.process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return job.job.encode() in words
