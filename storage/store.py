"""The one interface to bytes by name: folders and S3-compatible stores look the same from above."""

import io
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import canonical_json
from .errors import BucketNotFound, ObjectNotFound, StorageError, StoreUnreachable, TooLarge
from .json_text import MOST_SIGNS
from .uri import is_s3, normalize

MIN_PART_BYTES = 5 << 20
"""No part of an upload but the last may be smaller: S3's limit, which folders do not check."""
MAX_PARTS = 10_000
"""S3's limit of one upload."""
MOST_JSON_BYTES = 128 << 20
"""Of a manifest, a record, a pointer: a checkpoint of a hundred thousand layers has some forty million."""


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What a store says of an object without its bytes; `etag` changes whenever the bytes do.

    It is the MD5 of small objects; of large ones it tells nothing of their bytes, and is another in every place.
    """

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A write that began and did not end: `key` is the object it was for, as far as that is known.

    `place` is where its bytes lie (a file; "" on S3), `upload` the id of a multipart upload ("" for a torn write).
    """

    key: str
    upload: str
    place: str = ""
    size_bytes: int = 0


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
    BucketNotFound, StoreUnreachable, NotWritable (writes), SourceChanged (ranges), UploadGone (parts), TooLarge (get).
    """

    @property
    def uri(self) -> str:
        """The root, normalized."""
        ...

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        """The whole object, compared with the checksum that the server keeps of it, if it keeps one.

        SourceChanged if its etag is not `etag`; TooLarge, before a byte is read, if it has more than `most_bytes`.
        """
        ...

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """Exactly `length` bytes from byte `start`; SourceChanged if they are not there, or the etag is not `etag`."""
        ...

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        """Fills the writable, contiguous `buffer` with the bytes from byte `start`; errors as `get_range`.

        What is in the buffer after an error is undefined.
        """
        ...

    def head(self, key: str) -> ObjectInfo:
        """Size and etag."""
        ...

    def stored_crc32(self, key: str, *, etag: str) -> tuple[int, int] | None:
        """Bytes and CRC-32 of the whole object, as the server has kept them since it was written; None if it has not.

        SourceChanged if its etag is not `etag`.
        """
        ...

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key starts with the plain string `prefix`, at any depth, by the bytes of the key.

        Objects whose name is no valid key (folder markers ending in `/`, control characters) are left out.
        """
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Key and bytes of what `list` gives, in its order, without etags: folders then need not read small files."""
        ...

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Writes or replaces the object; readers see the old bytes or the new ones, never a part."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Writes the object unless there is one; True if it now holds `data`, False if it holds something else.

        A claim must therefore carry a token of its owner: the same bytes twice are the same claim.
        """
        ...

    def create_upload(self, key: str) -> str:
        """Begins an object that many processes write in parts; its id. Nothing shows until `complete_upload`.

        It goes on until it is completed or aborted, whatever becomes of the processes.
        """
        ...

    def upload_part(
        self, key: str, upload_id: str, *, number: int, offset: int, data: memoryview | bytes
    ) -> str:
        """Writes part `number` (1 to MAX_PARTS), which lies at byte `offset` of the object; its etag.

        Parts may come in any order and from any process; the same number again replaces the part. When this returns,
        the bytes are as safe as those of `put`. The etag is short printable text for `complete_upload` alone.
        Raises UploadGone if there is no such upload.
        """
        ...

    def upload_exists(self, key: str, upload_id: str) -> bool:
        """Whether parts can be added: False once it was completed or aborted."""
        ...

    def complete_upload(self, key: str, upload_id: str, etags: Sequence[str]) -> ObjectInfo:
        """Makes the object of parts 1 to n, in their order, and replaces what was there in one step.

        `etags` are what `upload_part` gave for them; all but the last must have MIN_PART_BYTES (else NotWritable).
        Completing again what is complete gives the same answer. Raises UploadGone if there is no such upload, or it
        has other parts than these.
        """
        ...

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Drops the upload and its parts; one that is gone is no error."""
        ...

    def list_unfinished(self) -> Sequence[Unfinished]:
        """Uploads that were neither completed nor aborted, and what killed writers left, below this root."""
        ...

    def discard(self, item: Unfinished) -> None:
        """Removes what `list_unfinished` gave; one that is gone is no error."""
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


def bytes_of(fill: Callable[[memoryview], None], length: int) -> bytes:
    """The `length` bytes that `fill` puts into the buffer it is given; no copy is made of them."""
    buffer = io.BytesIO()
    if length:
        buffer.seek(length - 1)
        buffer.write(b"\0")
    with buffer.getbuffer() as view:
        fill(view)
    return buffer.getvalue()


def read_json(
    store: ObjectStore, key: str, *, most_bytes: int = MOST_JSON_BYTES, most_signs: int = MOST_SIGNS
) -> Any:
    """The value that a JSON object holds. ValueError for what is too large, or as `canonical_json.loads` says."""
    try:
        data = store.get(key, most_bytes=most_bytes)
    except TooLarge as error:
        raise ValueError(str(error)) from None
    return canonical_json.loads(data, most_signs=most_signs)


def check_size(place: str, size_bytes: int, most_bytes: int | None) -> None:
    """TooLarge as ObjectStore.get raises it."""
    if most_bytes is not None and size_bytes > most_bytes:
        raise TooLarge(
            f"{place} has {size_bytes} bytes, more than {most_bytes}: it is none of ours; delete it"
        )


def text_field(store: ObjectStore, key: str, name: str) -> str | None:
    """A field of a small JSON object as text; None if there is no such object or field, or it cannot be read."""
    try:
        return str(read_json(store, key)[name])
    except (ObjectNotFound, ValueError, LookupError, TypeError):
        return None


def flat_view(data: memoryview | bytes) -> memoryview:
    """`data` as one row of bytes, without a copy."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # no cast is allowed of an empty table


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
