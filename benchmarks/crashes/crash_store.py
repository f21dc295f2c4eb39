"""Stores as they are on a bad day: one operation fails or ends the process, writes ignore conditions, all is slow.

    fault = Fault("kill after", 17, note)
    store = Troubled(open_store(uri), fault)

A fault counts the operations of a run on all its stores together. Those of the heartbeat are left out: they come from a
clock, and would make the count another one each time.
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from fleetpress.storage.errors import StorageError, StoreUnreachable
from fleetpress.storage.store import ObjectStore, StoreProbe, probe_store

MODES = {
    "fails before": "the operation is refused",
    "fails after": "the operation is done, and its reply is lost",
    "gone": "this operation and all later ones are refused",
    "killed before": "the process dies before the operation",
    "killed after": "the process dies once the operation is done",
}
KILLED = 9  # the exit code of a run that a fault ended

_OPERATIONS = {
    "get",
    "get_range",
    "read_into",
    "head",
    "stored_crc32",
    "list",
    "sizes",
    "put",
    "put_if_absent",
    "create_upload",
    "upload_part",
    "upload_exists",
    "complete_upload",
    "abort_upload",
    "list_unfinished",
    "discard",
    "delete",
}

Note = Callable[[dict[str, Any]], None]


class Fault:
    """What goes wrong at the operation of number `at`, counted from 1; with 0 nothing does.

    `note` is told once: {"event": "fault", "operation"}. `pauses` seeds short waits before each operation, which mix
    two runs in another way for every seed.
    """

    def __init__(self, mode: str, at: int, note: Note, *, pauses: int | None = None) -> None:
        self.count = 0
        self._mode = mode
        self._at = at
        self._note = note
        self._gone = False
        self._lock = threading.Lock()
        self._pauses = None if pauses is None else random.Random(pauses)

    def around(self, operation: str, place: str, work: Callable[[], Any]) -> Any:
        """`work()`, unless this is the operation that the fault is for. Raises StoreUnreachable."""
        if self._pauses is not None:
            with self._lock:
                seconds = self._pauses.choice((0, 0, 0.002, 0.01, 0.03))
            time.sleep(seconds)
        if self._gone:
            raise _unreachable(place)
        if not self._is_next():
            return work()
        self._note({"event": "fault", "operation": f"{operation} {place}"})
        if self._mode == "gone":
            self._gone = True
        if self._mode.endswith("after"):
            with contextlib.suppress(StorageError):
                work()
        if self._mode.startswith("killed"):
            os._exit(KILLED)
        raise _unreachable(place)

    def _is_next(self) -> bool:
        if threading.current_thread().name == "heartbeat":
            return False
        with self._lock:
            self.count += 1
            return self.count == self._at


class Troubled:
    """`store`, with every operation passed through `fault`; `blind`: it writes without regard to conditions."""

    def __init__(self, store: ObjectStore, fault: Fault, *, blind: bool = False) -> None:
        self._store = store
        self._fault = fault
        self._blind = blind

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in _OPERATIONS:
            return found
        if name == "put_if_absent" and self._blind:
            found = self._put_anyway

        def passed(*args: Any, **options: Any) -> Any:
            key = str(args[0]) if args else ""
            if key.endswith("/alive.json"):  # its first beat comes from the driver's own thread
                return found(*args, **options)
            return self._fault.around(name, f"{self._store.uri}/{key}", lambda: found(*args, **options))

        return passed

    def probe(self) -> StoreProbe:
        """By the operations above: a fault may lie in one of them."""
        return probe_store(self)  # type: ignore[arg-type] # __getattr__ gives the rest

    def _put_anyway(self, key: str, data: bytes) -> bool:
        self._store.put(key, data)
        return True


def _unreachable(place: str) -> StoreUnreachable:
    return StoreUnreachable(f"{place}: the store does not answer (a fault of this test): try again")
