"""The ceiling that a task declared, enforced: what it allocates beyond that fails in the task, not on the machine.

The kernel counts the private writable memory of a process, touched or not, against RLIMIT_DATA (Linux, see
getrlimit(2)). Where there is no such count (macOS) nothing is enforced.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fleetpress.storage.memory import asked_bytes

_STATUS = "/proc/self/status"
_DATA = re.compile(rb"VmData:\s+(\d+) kB")
# Stacks of the threads that read, compute and send: reserved whole, hardly ever touched.
_STACKS_BYTES = 96 << 20

_lock = threading.Lock()
_declared: list[int] = []  # by the tasks that run in this process
_base_bytes = 0  # before the first of them began
_limit_before: tuple[int, int] | None = None


@contextmanager
def ceiling(memory_bytes: int) -> Iterator[None]:
    """Inside, the process may grow by `memory_bytes` (0: as it likes); tasks side by side share the sum of theirs.

    What goes beyond raises MemoryError, or RuntimeError where torch allocates.
    """
    if not memory_bytes or data_bytes() is None:
        yield
        return
    _change(memory_bytes, enter=True)
    try:
        yield
    finally:
        _change(memory_bytes, enter=False)


def data_bytes() -> int | None:
    """Private writable memory of this process, None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        with open(_STATUS, "rb") as file:
            found = _DATA.search(file.read())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def give_back() -> None:
    """Freed memory to the system: glibc keeps what lies between blocks in use, a little more with every task."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def needed_bytes(error: BaseException) -> int:
    """What the process would have grown to if `error` had not stopped it, as far as the error tells; 0: unknown."""
    now = data_bytes()
    grown = max(0, now - _base_bytes) if now is not None and _declared else 0
    return grown + asked_bytes(error) if grown else 0


def _change(memory_bytes: int, *, enter: bool) -> None:
    global _base_bytes, _limit_before  # noqa: PLW0603 - a limit belongs to the process
    import resource  # not on every system

    with _lock:
        if enter:
            if not _declared:
                _base_bytes = data_bytes() or 0
                _limit_before = resource.getrlimit(resource.RLIMIT_DATA)
            _declared.append(memory_bytes)
        else:
            _declared.remove(memory_bytes)
        assert _limit_before is not None
        soft, hard = _limit_before
        if _declared:
            soft = _base_bytes + sum(_declared) + _STACKS_BYTES
            if hard != resource.RLIM_INFINITY:
                soft = min(soft, hard)
        with suppress(ValueError, OSError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
