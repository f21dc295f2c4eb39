"""A shard in the making: its multipart upload, the crumbs of its tail, and the proof of what was written."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fleetpress.storage.artifact import ArtifactFile, exists
from fleetpress.storage.buffers import SHARED
from fleetpress.storage.errors import ArtifactCorrupt, UploadGone
from fleetpress.storage.etags import Part, parse_parts
from fleetpress.storage.store import ObjectStore
from fleetpress.storage.streams import PartWriter, Stages, read_ahead

from ..handover import Payload
from .stream import ahead_bytes


@dataclass(frozen=True, kw_only=True)
class Run:
    """Bytes of an object, and what their checksum must be."""

    key: str
    offset_bytes: int
    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard's multipart upload, and the part of it that a task's payload describes."""

    store: ObjectStore
    key: str
    upload: str
    payload: Payload
    stages: Stages

    def writer(self) -> PartWriter:
        """Takes the bytes of the payload's parts, and sends them."""
        return PartWriter(
            self._send,
            self.payload["parts"],
            self.stages,
            buffers=SHARED,
            first_number=self.payload["first_part"],
            offset_bytes=self.payload["offset_bytes"],
        )

    def completed(self, etags: Sequence[str]) -> ArtifactFile:
        """Make the shard of its parts and read it back. Raises ArtifactCorrupt for other bytes than were sent."""
        store, key, size = self.store, self.key, self.payload["shard_bytes"]
        try:
            store.complete_upload(key, self.upload, etags)
        except UploadGone:
            self._require_completed()
        digest = hashlib.sha256()
        sent = (
            Run(key=key, offset_bytes=part.offset_bytes, bytes=part.size_bytes, crc32=part.crc32)
            for part in parse_parts(etags, key)
        )
        for view in self.read(sent):
            self.stages.compute.timed(len(view), partial(digest.update, view))
        return ArtifactFile(path=self.payload["shard"], bytes=size, sha256=digest.hexdigest())

    def read(self, runs: Iterable[Run]) -> Iterator[memoryview]:
        """The bytes of each run, ahead of their use. Raises ArtifactCorrupt if they are not what was written."""
        ahead = ahead_bytes(self.payload["block_bytes"])
        for _, view in read_ahead(runs, self._read, self.stages, buffers=SHARED, ahead_bytes=ahead):
            yield view

    def _read(self, run: Run, view: memoryview) -> None:
        # Not pinned to an etag: another run may put the same bytes in its place meanwhile.
        self.store.read_into(run.key, run.offset_bytes, view)
        if zlib.crc32(view) != run.crc32:
            self.store.delete(run.key)  # so that the next run makes it anew
            raise ArtifactCorrupt(
                f"{self.store.uri}/{run.key} reads back differently from what was written: "
                "check the store and run again"
            )

    def _send(self, number: int, offset_bytes: int, data: memoryview) -> str:
        """Upload a part, unless the whole shard is there already; its etag."""
        try:
            return self.store.upload_part(
                self.key, self.upload, number=number, offset=offset_bytes, data=data
            )
        except UploadGone:
            self._require_completed()
            return str(Part(offset_bytes, len(data), zlib.crc32(data)))

    def _require_completed(self) -> None:
        """An upload is gone once it is completed: by a run that died then, or by another one. Raises UploadGone."""
        size = self.payload["shard_bytes"]
        if not exists(self.store, self.key) or self.store.head(self.key).size_bytes != size:
            raise UploadGone(
                f"{self.store.uri}/{self.key}: its unfinished upload is gone: run again to begin it anew"
            )


class Crumbling:
    """Sends the body on to `write`, and keeps what belongs into the tail."""

    def __init__(self, write: Callable[[memoryview], None]) -> None:
        self.body = write
        self._crumbs: dict[int, bytearray] = {}

    def crumb(self, kind: int, data: memoryview) -> None:
        self._crumbs.setdefault(kind, bytearray()).extend(data)

    def joined(self) -> bytes:
        """All crumbs, class after class."""
        return b"".join(data for _, data in sorted(self._crumbs.items()))

    def checksums(self) -> list[tuple[int, int, int]]:
        """Of each class that is there: class, bytes and CRC-32."""
        return [(kind, len(data), zlib.crc32(data)) for kind, data in sorted(self._crumbs.items()) if data]
