"""Etags of files: the MD5 of their bytes (what S3 gives for a simple upload), remembered while the file is the same.

A file counts as the same while its path, size, inode, mtime and ctime are. That says nothing about a file changed
within the last moments: a second write in the same tick of the file system's clock leaves all of them as they were.
So nothing is remembered of a file younger than two seconds (git calls such entries racy).
"""

import contextlib
import functools
import hashlib
import os
import sqlite3
import threading
import time
from typing import BinaryIO, NamedTuple

_RACY_SECONDS = 2.0
_PIECE_BYTES = 1 << 20
_WORTH_A_ROW_BYTES = 256 << 10  # smaller files are hashed faster than a row is committed

_SCHEMA = """
CREATE TABLE IF NOT EXISTS etags (
    path TEXT PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER, device INTEGER,
    etag TEXT NOT NULL
)
"""
_SELECT = (
    "SELECT etag FROM etags "
    "WHERE path = ? AND size_bytes = ? AND mtime_ns = ? AND ctime_ns = ? AND inode = ? AND device = ?"
)


class FileIdentity(NamedTuple):
    """What must stay as it is for a remembered etag to hold."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


def identity_of(file: BinaryIO) -> FileIdentity:
    """The identity of an open file."""
    status = os.fstat(file.fileno())
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


def etag_of_bytes(data: bytes) -> str:
    """MD5 in hex: what S3 gives as etag of an object uploaded in one piece."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def etag_of_file(file: BinaryIO, path: str) -> tuple[str, int]:
    """(etag, size in bytes) of an open file, from memory if it is known; otherwise reads the file from its start."""
    before = identity_of(file)
    cache = _cache(_cache_folder(), os.getpid())
    known = cache.get(path, before)
    if known is not None:
        return known, before.size_bytes
    settled = _is_settled(before)
    etag, size_bytes = _hash(file)
    if settled and identity_of(file) == before:
        cache.put(path, before, etag)
    return etag, size_bytes


class EtagCache:
    """Etags in memory, the costly ones also in `<folder>/etags.sqlite`; without a usable folder, in memory only."""

    def __init__(self, folder: str) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[FileIdentity, str]] = {}
        self._database = _connect(folder)

    def get(self, path: str, identity: FileIdentity) -> str | None:
        """The etag of the file at `path`, if it is still the one that was remembered."""
        with self._lock:
            known = self._known.get(path)
            if known is not None and known[0] == identity:
                return known[1]
            row = self._execute(_SELECT, (path, *identity))
            if row is None:
                return None
            self._known[path] = (identity, row)
            return row

    def put(self, path: str, identity: FileIdentity, etag: str) -> None:
        """Remembers the etag of the file at `path`."""
        with self._lock:
            self._known[path] = (identity, etag)
            if identity.size_bytes >= _WORTH_A_ROW_BYTES:
                self._execute(
                    "INSERT OR REPLACE INTO etags VALUES (?, ?, ?, ?, ?, ?, ?)", (path, *identity, etag)
                )

    def _execute(self, statement: str, values: tuple[object, ...]) -> str | None:
        if self._database is None:
            return None
        try:
            with self._database:
                row = self._database.execute(statement, values).fetchone()
        except (sqlite3.Error, OverflowError, UnicodeEncodeError):
            self._database = None  # a cache that is locked, full or damaged only costs the time to hash again
            return None
        return str(row[0]) if row else None


@functools.lru_cache(maxsize=8)
def _cache(folder: str, _process: int) -> EtagCache:
    """One per folder and process: an sqlite connection must not be carried over a fork."""
    return EtagCache(folder)


def _cache_folder() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "fleetpress")


def _connect(folder: str) -> sqlite3.Connection | None:
    with contextlib.suppress(OSError, sqlite3.Error):
        os.makedirs(folder, exist_ok=True)
        database = sqlite3.connect(os.path.join(folder, "etags.sqlite"), timeout=5.0, check_same_thread=False)
        with database:
            database.execute(_SCHEMA)
        return database
    return None


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
