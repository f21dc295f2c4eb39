"""Bytes on their way in, compared with what the server has kept of them since they were written.

A range of an object comes without a checksum, and a flipped bit or a range of another place passes every client. Many
servers keep the CRC-32 of objects that were written in one request (boto3 sends it): that of all ranges together must
be the same. Objects written in parts, folders, and servers that keep none are protected by length, etag and, with
https, by the connection; `verify --deep` reads the source again.
"""

import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence

from fleetpress.storage.checksums import combined_crc32
from fleetpress.storage.errors import StoreUnreachable
from fleetpress.storage.safetensors_header import LENGTH_BYTES
from fleetpress.storage.store import ObjectStore
from fleetpress.storage.uri import join

_MOST_HEADER_BYTES = 32 << 20

Ranges = dict[str, list[list[int]]]  # of each file: offset, bytes and CRC-32, by offset


class Received:
    """Reads ranges of one source's files for a task; keeps their checksums where there is one to compare with."""

    def __init__(self, source: ObjectStore, files: Iterable[Sequence[str]]) -> None:
        self._source = source
        self._kept = {path: source.stored_crc32(path, etag=etag) for path, etag in files}
        self._seen: dict[str, dict[tuple[int, int], int]] = {}
        self._lock = threading.Lock()

    def read_into(self, path: str, offset_bytes: int, view: memoryview, *, etag: str) -> None:
        """As the store's. Raises StoreUnreachable if a range reads differently the second time."""
        self._source.read_into(path, offset_bytes, view, etag=etag)
        if self._kept[path] is None:
            return
        crc32, place = zlib.crc32(view), (offset_bytes, len(view))
        with self._lock:
            before = self._seen.setdefault(path, {}).setdefault(place, crc32)
        if before != crc32:
            raise _damaged(self._source, path)

    def ranges(self) -> Ranges:
        """What was read, neighbours joined; of ranges that overlap (read again in other pieces) the first ones."""
        return {
            path: joined([*place, crc32] for place, crc32 in seen.items())
            for path, seen in self._seen.items()
        }

    def unproved(self) -> Ranges:
        """Compare every file that was read as a whole; the ranges of the others. Raises StoreUnreachable."""
        return {
            path: ranges
            for path, ranges in self.ranges().items()
            if not is_proved(self._source, path, ranges, self._kept[path])
        }


def joined(ranges: Iterable[Sequence[int]]) -> list[list[int]]:
    """The ranges by offset, those that touch made one; one that lies within what is there already is left out."""
    found: list[list[int]] = []
    for offset, size, crc32 in sorted(ranges, key=lambda one: (one[0], -one[1])):
        end = found[-1][0] + found[-1][1] if found else -1
        if offset == end:
            found[-1][2] = combined_crc32([(found[-1][1], found[-1][2]), (size, crc32)])
            found[-1][1] += size
        elif offset > end:
            found.append([offset, size, crc32])
    return found


def merged(many: Iterable[Mapping[str, Sequence[Sequence[int]]]]) -> Ranges:
    """The ranges of several tasks together."""
    together: dict[str, list[Sequence[int]]] = {}
    for one in many:
        for path, ranges in one.items():
            together.setdefault(path, []).extend(ranges)
    return {path: joined(ranges) for path, ranges in together.items()}


def is_proved(
    source: ObjectStore, path: str, ranges: Sequence[Sequence[int]], kept: tuple[int, int] | None
) -> bool:
    """Whether the ranges, with the header before them, are the file. False if more is needed to tell.

    Raises StoreUnreachable if they are all of it, and not what the server keeps.
    """
    if kept is None or len(ranges) != 1:
        return False
    size_bytes, wanted = kept
    [(start, length, crc32)] = ranges
    if start + length != size_bytes or start > _MOST_HEADER_BYTES:
        return False
    header = source.get_range(path, 0, start)
    if LENGTH_BYTES + int.from_bytes(header[:LENGTH_BYTES], "little") != start:
        return False  # tensors, too, lie before what was read
    if combined_crc32([(start, zlib.crc32(header)), (length, crc32)]) != wanted:
        raise _damaged(source, path)
    return True


def _damaged(source: ObjectStore, path: str) -> StoreUnreachable:
    return StoreUnreachable(
        f"{join(source.uri, path)}: its bytes were damaged on their way here (their checksum is not the one that the "
        "server keeps): try again"
    )
