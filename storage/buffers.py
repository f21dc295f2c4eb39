"""Buffers that are used again: new memory is dear (copies into it run at 2 GB/s, into touched memory at 17)."""

import threading

import numpy as np
import numpy.typing as npt

_ROUND_BYTES = 1 << 20


class Buffers:
    """Lends writable views; at most `keep_bytes` of memory that nobody uses stay for the next taker."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._free: list[npt.NDArray[np.uint8]] = []
        self._lent: dict[int, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> memoryview:
        """A view of exactly `size_bytes`, its content undefined."""
        with self._lock:
            fitting = [block for block in self._free if block.nbytes >= size_bytes]
            if fitting:
                block = min(fitting, key=len)
                self._free = [other for other in self._free if other is not block]
            else:
                self._make_room(size_bytes)
                block = np.empty(max(1, -(-size_bytes // _ROUND_BYTES)) * _ROUND_BYTES, dtype=np.uint8)
            view = block.data[:size_bytes]
            self._lent[id(view)] = block
            return view

    def give_back(self, view: memoryview) -> None:
        """Ends the use of a view that `take` gave: its bytes will be another's."""
        with self._lock:
            block = self._lent.pop(id(view))
            if sum(other.nbytes for other in self._free) + block.nbytes <= self._keep_bytes:
                self._free.append(block)

    def _make_room(self, size_bytes: int) -> None:
        """Free blocks that are all too small go, so that what is kept and what is lent do not add up."""
        while self._free and sum(block.nbytes for block in self._free) + size_bytes > self._keep_bytes:
            self._free.pop(0)


SHARED = Buffers(keep_bytes=128 << 20)  # one per process: tasks that follow one another find warm memory
