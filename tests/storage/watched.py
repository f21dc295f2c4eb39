"""What tests of streams watch: buffers that are lent, threads at once, and work that must not hang."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fleetpress.storage.buffers import Buffers

SECONDS = 20  # nothing here takes as long, unless it hangs
_T = TypeVar("_T")


class Watched(Buffers):
    """Knows how many bytes and views are lent, and how many were at once."""

    def __init__(self) -> None:
        super().__init__(keep_bytes=4 << 20)
        self.now = self.peak = self.views = self.most_views = 0
        self._counting = threading.Lock()

    def take(self, size_bytes: int) -> memoryview:
        view = super().take(size_bytes)
        with self._counting:
            self.now, self.views = self.now + size_bytes, self.views + 1
            self.peak, self.most_views = max(self.peak, self.now), max(self.most_views, self.views)
        return view

    def give_back(self, view: memoryview) -> None:
        with self._counting:
            self.now, self.views = self.now - len(view), self.views - 1
        super().give_back(view)


class AtOnce:
    """A context that counts how many threads are in it, and how many were at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1


def within(work: Callable[[], _T]) -> _T:
    """What `work` gives or raises; an error if it hangs."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(timeout=SECONDS)
    finally:
        pool.shutdown(wait=False)
