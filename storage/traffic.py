"""Bytes of objects that a piece of work reads and writes, counted by the stores while it runs, in all its threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Traffic:
    """What one piece of work has moved so far; headers, listings and the client's own repeats are not counted."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self._lock = threading.Lock()  # several threads read and send

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Note bytes that have arrived, here or in the store."""
        with self._lock:
            self.bytes_read += read
            self.bytes_written += written


_current: ContextVar[Traffic | None] = ContextVar("traffic", default=None)


@contextmanager
def counted() -> Iterator[Traffic]:
    """What this thread moves inside the context, and what others move for it (`carried`)."""
    traffic = Traffic()
    token = _current.set(traffic)
    try:
        yield traffic
    finally:
        _current.reset(token)


def carried(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function` for another thread, which counts for the caller of this one."""
    traffic = _current.get()

    @wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        token = _current.set(traffic)
        try:
            return function(*args, **options)
        finally:
            _current.reset(token)

    return call


def note_read(size_bytes: int) -> None:
    """A store has read so many bytes of an object."""
    traffic = _current.get()
    if traffic is not None:
        traffic.add(read=size_bytes)


def note_written(size_bytes: int) -> None:
    """A store has written so many bytes of an object."""
    traffic = _current.get()
    if traffic is not None:
        traffic.add(written=size_bytes)
