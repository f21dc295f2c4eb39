"""The one interface to bytes by name: folders and S3-compatible stores look the same from above."""

import os
import threading
import uuid
from dataclasses import dataclass
from typing import Protocol

from .errors import BucketNotFound, StorageError, StoreUnreachable
from .uri import is_s3, normalize


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What a store says of an object without its bytes; `etag` changes whenever the bytes do."""

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, kw_only=True)
class StoreProbe:
    """What a store was seen to do; `problem` is empty when it did everything."""

    reachable: bool
    writable: bool
    conditional_writes: bool
    problem: str = ""


class ObjectStore(Protocol):
    """Objects below one root `uri`. Keys are relative and use `/`; see `uri.validate_key`.

    Every method raises a StorageError and nothing else: InvalidUri (key), ObjectNotFound, AccessDenied,
    BucketNotFound, StoreUnreachable, NotWritable (writes), SourceChanged (ranges).
    """

    @property
    def uri(self) -> str:
        """The root, normalized."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object."""
        ...

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """Exactly `length` bytes from byte `start`; SourceChanged if they are not there, or the etag is not `etag`."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """Size and etag."""
        ...

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key starts with the plain string `prefix`, at any depth, by the bytes of the key.

        Objects whose name is no valid key (folder markers ending in `/`, control characters) are left out.
        """
        ...

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Writes or replaces the object; readers see the old bytes or the new ones, never a part."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Writes the object unless there is one; True if it now holds `data`, False if it holds something else.

        A claim must therefore carry a token of its owner: the same bytes twice are the same claim.
        """
        ...

    def delete(self, key: str) -> None:
        """Removes the object; one that is not there is no error."""
        ...

    def probe(self) -> StoreProbe:
        """Tries what runs rely on, with a key of its own that it removes again; never raises."""
        ...


_stores: dict[str, ObjectStore] = {}
_stores_lock = threading.Lock()


def open_store(uri: str) -> ObjectStore:
    """The store rooted at `uri`, one per process and place; safe to share between threads.

    Touches neither disk nor network. Raises InvalidUri.
    """
    place = normalize(uri)
    if not is_s3(place):
        place = os.path.abspath(place)  # a relative path means another folder after a chdir
    with _stores_lock:
        store = _stores.get(place)
        if store is None:
            store = _stores[place] = _new_store(place)
        return store


def probe_store(store: ObjectStore) -> StoreProbe:
    """What `ObjectStore.probe` promises, by means of the store's other methods."""
    key = f"fleetpress-probe-{uuid.uuid4().hex}"
    first, second = b"first", b"second"
    try:
        writable = store.put_if_absent(key, first) and store.get(key) == first
        refused = not store.put_if_absent(key, second) and store.get(key) == first
        store.delete(key)
    except (StoreUnreachable, BucketNotFound) as error:
        return StoreProbe(reachable=False, writable=False, conditional_writes=False, problem=str(error))
    except StorageError as error:
        return StoreProbe(reachable=True, writable=False, conditional_writes=False, problem=str(error))
    problem = (
        "" if refused else f"{store.uri}: the server ignores If-None-Match, so two runs could claim one task"
    )
    return StoreProbe(reachable=True, writable=writable, conditional_writes=refused, problem=problem)


def _new_store(place: str) -> ObjectStore:
    if is_s3(place):
        from .s3 import S3Store  # boto3 costs 0.2 s: only those who use S3 pay for it

        return S3Store(place)
    from .local import FolderStore

    return FolderStore(place)
