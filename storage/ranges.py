"""One stored object as a read-only file: a few ranges instead of the whole."""

import io
from collections.abc import Iterable
from typing import Any

from .store import ObjectStore

_MERGE_GAP_BYTES = 256  # so much may lie between two spans that are fetched as one


class RangeFile(io.RawIOBase):
    """Reads exactly what is asked for, pinned by etag; `bytes_read` counts what crossed the wire."""

    def __init__(self, store: ObjectStore, key: str, size_bytes: int, etag: str | None) -> None:
        super().__init__()
        self._store, self._key, self._size_bytes, self._etag = store, key, size_bytes, etag
        self._position = 0
        self._fetched: list[tuple[int, bytes]] = []
        self.bytes_read = 0

    def prefetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Fetches the spans (start, end), neighbours with one request; later reads inside them cost nothing."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            if merged and start - merged[-1][1] <= _MERGE_GAP_BYTES:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        self._fetched += [
            (start, self._fetch(start, min(end, self._size_bytes) - start)) for start, end in merged
        ]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} lies before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        length = max(0, min(len(buffer), self._size_bytes - self._position))
        data = self._read(self._position, length)
        buffer[:length] = data
        self._position += length
        return length

    def _read(self, start: int, length: int) -> bytes:
        for first, data in self._fetched:
            if first <= start and start + length <= first + len(data):
                return data[start - first : start - first + length]
        return self._fetch(start, length)

    def _fetch(self, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        self.bytes_read += length
        return self._store.get_range(self._key, start, length, etag=self._etag)
