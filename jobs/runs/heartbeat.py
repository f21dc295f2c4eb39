"""A run's sign of life in the output, and the wish of others that it ends.

While a run works it counts `runs/<run>/alive.json` up, every few seconds from a thread. Who wants to know whether a
run lives looks twice: clocks of different machines are never compared. (On the driver's own machine one look at its
process will do.) `runs/<run>/cancel.json` asks a run to end.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from fleetpress.storage import canonical_json
from fleetpress.storage.artifact import exists
from fleetpress.storage.errors import ObjectNotFound, StorageError
from fleetpress.storage.store import MOST_JSON_BYTES, ObjectStore

BEAT_SECONDS = 4.0
DEAD_SECONDS = 20.0  # a run that was not seen to beat for this long is dead

_log = logging.getLogger(__name__)


def alive_key(run: str) -> str:
    """The key of a run's sign of life."""
    return f"runs/{run}/alive.json"


def cancel_key(run: str) -> str:
    """The key of the wish that a run ends."""
    return f"runs/{run}/cancel.json"


class Heartbeat:
    """Beats from entering to leaving the context. `on_cancel` is called in the beating thread, and
    again after half a minute if the run still lives.

    A beat that cannot be written is missed, no more: `longest_gap_seconds` says whether others may have given us up.
    """

    def __init__(self, store: ObjectStore, run: str, on_cancel: Callable[[], None]) -> None:
        self._store = store
        self._run = run
        self._on_cancel = on_cancel
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._beats = 0
        self._last = time.monotonic()
        self._longest = 0.0
        self.cancelled = False

    def __enter__(self) -> Heartbeat:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(BEAT_SECONDS)  # it may hang in a request to a store that is gone
        try:
            self._store.delete(alive_key(self._run))
            if self.cancelled:
                self._store.delete(cancel_key(self._run))
        except StorageError as error:
            _log.warning("the run's sign of life stays behind (%s); gc removes it", error)

    def longest_gap_seconds(self) -> float:
        """The longest time between two beats so far, the present one included."""
        return max(self._longest, time.monotonic() - self._last)

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._beat()
                if not self.cancelled and exists(self._store, cancel_key(self._run)):
                    self.cancelled = True
                    self._on_cancel()
            except StorageError as error:
                _log.warning("no sign of life could be written (%s)", error)

    def _beat(self) -> None:
        self._beats += 1
        sign = {"beat": self._beats, "host": socket.gethostname(), "process": os.getpid()}
        self._store.put(alive_key(self._run), canonical_json.dumps(sign))
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now


class Watch:
    """Whether other runs live, by looking again and again; `clock` is a monotonic one."""

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}

    def is_alive(self, run: str) -> bool:
        """False once the run has ended, or its sign has stayed the same for DEAD_SECONDS of looking."""
        silent_seconds = self.silent_seconds(run)
        return silent_seconds is not None and silent_seconds < DEAD_SECONDS

    def silent_seconds(self, run: str) -> float | None:
        """For how long the run's sign was seen to stay the same; None if it has ended, or died on this machine."""
        try:
            sign = self._store.get(alive_key(run), most_bytes=MOST_JSON_BYTES)
        except ObjectNotFound:
            return None
        if _has_died_here(sign):
            return None
        now = self._clock()
        before, since = self._seen.get(run, (b"", now))
        if sign != before:
            self._seen[run] = (sign, now)
            return 0.0
        return now - since


def _has_died_here(sign: bytes) -> bool:
    """Whether the driver ran on this machine and does not any more."""
    try:
        fields = canonical_json.loads(sign)
        if fields["host"] != socket.gethostname():
            return False
        os.kill(int(fields["process"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, LookupError, TypeError, OverflowError, OSError):
        return False
    return False
