"""Etags of files, and of the parts of an upload.

A file below 8 MiB has the MD5 of its bytes (what S3 gives an object that came in one request), remembered while the
file is the same: while its path, size, inode, mtime and ctime are. That says nothing about a file changed within the
last moments: a second write in the same tick of the file system's clock leaves all of them as they were. So nothing is
remembered of a file younger than two seconds (git calls such entries racy).
A larger file has the time of its last change and its size, as web servers do it: no model is read to plan with it.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from .errors import UploadGone

HASHED_BELOW_BYTES = 8 << 20  # from here on boto3 uploads in parts, and then S3's etag is no MD5 either

_RACY_SECONDS = 2.0
_PIECE_BYTES = 1 << 20


class FileIdentity(NamedTuple):
    """What must stay as it is for a remembered etag to hold."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


class Part(NamedTuple):
    """One part of an upload: where it lies in the object, and what it holds; `etag` is the server's own, if any.

    `str(part)` is what callers carry around as the part's etag: short, printable, without quotes.
    """

    offset_bytes: int
    size_bytes: int
    crc32: int
    etag: str = ""

    def __str__(self) -> str:
        return f"{self.offset_bytes:x}-{self.size_bytes:x}-{self.crc32:08x}-{self.etag}"


_known: dict[str, tuple[FileIdentity, str]] = {}
_lock = threading.Lock()


def identity_of(file: int | str) -> FileIdentity:
    """The identity of a file: an open one by its descriptor, or what lies at a path. Raises OSError."""
    status = os.stat(file)
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


def etag_of_bytes(data: bytes) -> str:
    """MD5 in hex: what S3 gives as etag of an object uploaded in one piece."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def etag_of_file(file: BinaryIO, path: str) -> tuple[str, int]:
    """(etag, size in bytes) of the open file at `path`; reads a small one from its start if its etag is not known."""
    before = identity_of(file.fileno())
    if before.size_bytes >= HASHED_BELOW_BYTES:
        return etag_of_identity(before), before.size_bytes
    with _lock:
        known = _known.get(path)
    if known is not None and known[0] == before:
        return known[1], before.size_bytes
    settled = _is_settled(before)
    etag, size_bytes = _hash(file)
    if settled and identity_of(file.fileno()) == before:
        with _lock:
            _known[path] = before, etag
    return etag, size_bytes


def etag_of_identity(identity: FileIdentity) -> str:
    """The etag of a file of 8 MiB and more, whose bytes nobody read: `<mtime in ns>-<size>`, both in hex."""
    return f"{identity.mtime_ns:x}-{identity.size_bytes:x}"


def parse_parts(etags: Iterable[str], place: str) -> list[Part]:
    """The parts of an upload to `place`, from 1 on, which lie one after another from byte 0.

    Raises UploadGone if they do not, or are no etags of parts: they were recorded for another upload.
    """
    parts: list[Part] = []
    end = 0
    for number, text in enumerate(etags, 1):
        try:
            offset, size, crc32, etag = text.split("-", 3)
            part = Part(int(offset, 16), int(size, 16), int(crc32, 16), etag)
        except ValueError as error:
            raise UploadGone(f"{place}: part {number} of its upload has no valid etag: run again") from error
        if part.offset_bytes != end:
            raise UploadGone(
                f"{place}: part {number} of its upload starts at byte {part.offset_bytes} instead of {end}: run again"
            )
        end += part.size_bytes
        parts.append(part)
    return parts


def _is_settled(identity: FileIdentity) -> bool:
    changed_ns = max(identity.mtime_ns, identity.ctime_ns)
    return time.time_ns() - changed_ns > _RACY_SECONDS * 1e9


def _hash(file: BinaryIO) -> tuple[str, int]:
    digest = hashlib.md5(usedforsecurity=False)
    size_bytes = 0
    file.seek(0)
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
        size_bytes += len(piece)
    return digest.hexdigest(), size_bytes
