"""A process that runs the command of one job and tells of it in the output: signs of life, the end, the last words.

    python -m fleetpress.jobs.schedule.attend OUTPUT JOB DEADLINE COMMAND...

`schedules/<name>/jobs/<fire>.json` says that it lives and how it ended; `.stop` beside it asks it to end; `.log` is the
end of what the command said.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import IO, Any

from fleetpress.storage.artifact import exists
from fleetpress.storage.errors import StorageError
from fleetpress.storage.store import ObjectStore, open_store

from .claims import SCHEDULES, fire_of
from .fires import stamp
from .records import LocalJob, record_bytes

BEAT_SECONDS = 10.0

_LOOK_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0  # of a command that was asked to end: it still writes down where it stands
_LOG_BYTES = 1 << 20
_INTERRUPTED = 130
_STDERR = 2  # stdout is for what the tick itself tells

_log = logging.getLogger(__name__)


def job_key(job_id: str) -> str:
    """Where a job says how it stands."""
    return f"{_prefix(job_id)}.json"


def stop_key(job_id: str) -> str:
    """Where others say that it is to end."""
    return f"{_prefix(job_id)}.stop"


def log_key(job_id: str) -> str:
    """Where its last words lie."""
    return f"{_prefix(job_id)}.log"


def attend(
    store: ObjectStore,
    job_id: str,
    command: Sequence[str],
    *,
    deadline_seconds: float | None,
    is_quiet: bool = True,
) -> int:
    """Run the command to its end; its exit code. SIGTERM, a wish to stop and the deadline end it in good order."""
    job = _Attended(store, job_id, deadline_seconds)
    with job, tempfile.TemporaryFile() as words:
        code = job.run(command, words if is_quiet else _STDERR)
        job.tell(phase="ended", exit_code=code)
        if is_quiet:
            job.keep(words)
    return code


class _Attended:
    """One job. Inside the context SIGTERM is a wish to stop it."""

    def __init__(self, store: ObjectStore, job_id: str, deadline_seconds: float | None) -> None:
        self._store = store
        self._job = job_id
        self._deadline_seconds = deadline_seconds
        self._is_unwanted = False
        self._reason = ""
        self._before: Any = None

    def __enter__(self) -> _Attended:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def run(self, command: Sequence[str], words: IO[bytes] | int) -> int:
        """The command's exit code; that of an interrupted run if it was stopped."""
        started = time.monotonic()
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        except OSError as error:
            self._reason = f"cannot be begun: {error.strerror}"
            return 1
        try:
            return self._watch(child, started)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()

    def _watch(self, child: subprocess.Popen[bytes], started: float) -> int:
        beat_at, asked_at = started, 0.0
        self.tell(phase="running")
        while True:
            try:
                code = child.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            now = time.monotonic()
            if code is not None:
                # A stopped run says itself that it was interrupted; one that was killed cannot.
                return _INTERRUPTED if asked_at and code else code if code >= 0 else 128 - code
            if now - beat_at >= BEAT_SECONDS:
                beat_at = now
                self.tell(phase="running")
                self._is_unwanted = self._is_unwanted or self._is_asked_to_stop()
            if self._deadline_seconds is not None and now - started > self._deadline_seconds:
                self._is_unwanted = True
                self._reason = self._reason or f"over its deadline of {self._deadline_seconds:g} s"
            if self._is_unwanted and not asked_at:
                asked_at = now
                child.terminate()
            elif asked_at and now - asked_at > _PATIENCE_SECONDS:
                child.kill()

    def tell(self, *, phase: str, exit_code: int = 0) -> None:
        """Write down how the job stands; a beat that cannot be written is missed, no more."""
        sign = LocalJob(
            job=self._job,
            phase=phase,
            host=socket.gethostname(),
            process=os.getpid(),
            beat_at=stamp(datetime.now(UTC)),
            exit_code=exit_code,
            reason=self._reason,
        )
        try:
            self._store.put(job_key(self._job), record_bytes(sign))
        except StorageError as error:
            _log.warning("no sign of life could be written (%s)", error)

    def keep(self, words: IO[bytes]) -> None:
        """Store the end of what the command said."""
        size = words.seek(0, os.SEEK_END)
        words.seek(max(0, size - _LOG_BYTES))
        try:
            self._store.put(log_key(self._job), words.read())
        except StorageError as error:
            _log.warning("its log could not be written (%s)", error)

    def _is_asked_to_stop(self) -> bool:
        try:
            return exists(self._store, stop_key(self._job))
        except StorageError:
            return False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._is_unwanted = True


def _prefix(job_id: str) -> str:
    schedule, fire = fire_of(job_id)
    return f"{SCHEDULES}{schedule}/jobs/{stamp(fire)}"


def main(words: Sequence[str]) -> int:
    """What `python -m` runs."""
    output, job_id, deadline, *command = words
    return attend(open_store(output), job_id, command, deadline_seconds=float(deadline) if deadline else None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
