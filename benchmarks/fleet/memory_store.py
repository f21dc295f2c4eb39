"""An object store in memory that counts requests as S3 would: by kind, and a listing by pages of 1,000 keys.

Bytes lie in an anonymous file of the kernel's, so that they do not count as memory of this process; `index_bytes` is
what the store itself needs of it.
"""

import hashlib
import os
import sys
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fleetpress.storage.errors import ObjectNotFound, SourceChanged, UploadGone
from fleetpress.storage.store import (
    ObjectInfo,
    StoreProbe,
    Unfinished,
    bytes_of,
    check_size,
    flat_view,
    probe_store,
)
from fleetpress.storage.uri import bucket_and_prefix, validate_key

PAGE_KEYS = 1000


class _Place(NamedTuple):
    start: int
    size: int
    etag: str


class Bucket:
    """All objects of the process, by their full key; `requests` counts (who asked, kind, first part of the key)."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.who = "driver"
        self._file = os.memfd_create("bucket")
        self._end = 0
        self._places: dict[str, _Place] = {}
        self._sorted: list[str] | None = []
        self._lock = threading.Lock()

    @property
    def index_bytes(self) -> int:
        """What keys and places take, as Python counts it."""
        return sys.getsizeof(self._places) + sum(
            sys.getsizeof(key) + sys.getsizeof(place) + sys.getsizeof(place.etag) + 2 * sys.getsizeof(1 << 30)
            for key, place in self._places.items()
        )

    def count(self, kind: str, key: str, requests: int = 1) -> None:
        """Note requests; `key` is relative to its store."""
        with self._lock:
            self.requests[self.who, kind, key.partition("/")[0]] += requests

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Whether it was written."""
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        with self._lock:
            if key in self._places:
                if only_if_absent:
                    return False
            else:
                self._sorted = None
            os.pwrite(self._file, data, self._end)
            self._places[key] = _Place(self._end, len(data), etag)
            self._end += len(data)
        return True

    def place(self, key: str, uri: str) -> _Place:
        """Where an object lies."""
        place = self._places.get(key)
        if place is None:
            raise ObjectNotFound(f"{uri}: no such object")
        return place

    def read(self, place: _Place, start: int, length: int) -> bytes:
        """Bytes of an object."""
        return os.pread(self._file, length, place.start + start)

    def remove(self, key: str) -> None:
        """One that is not there is no error."""
        with self._lock:
            if self._places.pop(key, None) is not None:
                self._sorted = None

    def below(self, prefix: str) -> list[tuple[str, _Place]]:
        """Keys with this prefix, in order."""
        with self._lock:
            keys = self._sorted = sorted(self._places) if self._sorted is None else self._sorted
        first = bisect_left(keys, prefix)
        last = bisect_left(keys, prefix + "\U0010ffff")
        return [(key, self._places[key]) for key in keys[first:last]]


class MemoryStore:
    """The part of a bucket below one uri. Knows no uploads: a fleet of small programs makes none."""

    def __init__(self, uri: str, bucket: Bucket) -> None:
        self.uri = uri
        self._bucket = bucket
        name, prefix = bucket_and_prefix(uri)
        self._root = f"{name}/{prefix}/" if prefix else f"{name}/"

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        """See ObjectStore."""
        self._bucket.count("GET", key)
        place = self._at(key, etag)
        check_size(f"{self.uri}/{key}", place.size, most_bytes)
        return self._bucket.read(place, 0, place.size)

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """See ObjectStore."""
        return bytes_of(lambda buffer: self.read_into(key, start, buffer, etag=etag), length)

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        """See ObjectStore."""
        self._bucket.count("GET", key)
        place, view = self._at(key, etag), flat_view(buffer)
        if start + len(view) > place.size:
            raise SourceChanged(f"{self.uri}/{key} ends before byte {start + len(view)}")
        view[:] = self._bucket.read(place, start, len(view))

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        self._bucket.count("HEAD", key)
        place = self._at(key, None)
        return ObjectInfo(key=key, size_bytes=place.size, etag=place.etag)

    def stored_crc32(self, key: str, *, etag: str) -> tuple[int, int] | None:
        """See ObjectStore: it keeps none."""
        self._bucket.count("HEAD", key)
        self._at(key, etag)
        return None

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """See ObjectStore."""
        return [
            ObjectInfo(key=key, size_bytes=place.size, etag=place.etag) for key, place in self._listed(prefix)
        ]

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ObjectStore."""
        return {key: place.size for key, place in self._listed(prefix)}

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """See ObjectStore."""
        self._bucket.count("PUT", key)
        self._bucket.write(self._root + validate_key(key), data)
        place = self._at(key, None)
        return ObjectInfo(key=key, size_bytes=place.size, etag=place.etag)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        self._bucket.count("conditional PUT", key)
        if self._bucket.write(self._root + validate_key(key), data, only_if_absent=True):
            return True
        return self.get(key) == data

    def create_upload(self, key: str) -> str:
        """See the class."""
        raise self._no_uploads(key)

    def upload_part(
        self, key: str, upload_id: str, *, number: int, offset: int, data: memoryview | bytes
    ) -> str:
        """See the class."""
        raise self._no_uploads(key)

    def upload_exists(self, key: str, upload_id: str) -> bool:
        """See the class."""
        return False

    def complete_upload(self, key: str, upload_id: str, etags: Sequence[str]) -> ObjectInfo:
        """See the class."""
        raise self._no_uploads(key)

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See the class."""

    def list_unfinished(self) -> Sequence[Unfinished]:
        """See the class."""
        return ()

    def discard(self, item: Unfinished) -> None:
        """See the class."""

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._bucket.count("DELETE", key)
        self._bucket.remove(self._root + validate_key(key))

    def probe(self) -> StoreProbe:
        """See ObjectStore."""
        return probe_store(self)

    def _no_uploads(self, key: str) -> UploadGone:
        return UploadGone(f"{self.uri}/{key}: this store knows no uploads")

    def _at(self, key: str, etag: str | None) -> _Place:
        place = self._bucket.place(self._root + validate_key(key), f"{self.uri}/{key}")
        if etag is not None and etag != place.etag:
            raise SourceChanged(f"{self.uri}/{key} has changed")
        return place

    def _listed(self, prefix: str) -> Sequence[tuple[str, _Place]]:
        found = self._bucket.below(self._root + prefix)
        self._bucket.count("LIST", prefix, max(1, -(-len(found) // PAGE_KEYS)))
        return [(key.removeprefix(self._root), place) for key, place in found]
