"""ZIP files from strangers: what their table of contents promises is checked before, and held to while, they unpack."""

import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, cast

from .quoting import one_line, quoted

_MOST_DIRECTORY_BYTES = 64 << 20
_MOST_MEMBERS = 200_000
_MOST_RATIO = 200  # DEFLATE reaches 1,030; numbers that repeat that much are not worth the risk
_ALWAYS_ALLOWED_BYTES = 64 << 20
_ENCRYPTED = 0x1 | 0x40
_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)


class ZipError(Exception):
    """What is wrong with a ZIP file, in words that go on after its name."""


class ZipReader:
    """The members of the ZIP in `file` of `size_bytes`; each is stored or deflated. Raises ZipError.

    All of them together may unpack to 200 times `size_bytes`, or to `always_allowed_bytes` if that is more.
    """

    def __init__(
        self, file: IO[bytes], size_bytes: int, *, always_allowed_bytes: int = _ALWAYS_ALLOWED_BYTES
    ) -> None:
        bounded = _Bounded(file, size_bytes)
        try:
            self._zip = zipfile.ZipFile(cast(IO[bytes], bounded))
        except (*_ERRORS, OSError) as error:
            raise ZipError(f"is no ZIP archive, or is cut short ({one_line(error)})") from None
        bounded.most_bytes = size_bytes
        self.infos: Sequence[zipfile.ZipInfo] = self._zip.infolist()
        self.directory_start = self._zip.start_dir
        _check_sum(self.infos, size_bytes, always_allowed_bytes)
        for info in self.infos:
            _check(info, self.directory_start)

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """The bytes of a member: as many as it states, their checksum compared."""
        try:
            with self._zip.open(info) as member:
                # Without a number, read() unpacks up to 2 GiB before it looks at the size that was stated.
                data = member.read(info.file_size)
        except _ERRORS as error:
            raise ZipError(f"has a damaged member {quoted(info.filename)} ({one_line(error)})") from None
        if len(data) != info.file_size:
            raise ZipError(
                f"has a member {quoted(info.filename)} of {len(data)} bytes that states {info.file_size}"
            )
        return data


class _Bounded:
    """A file of which no more is read at once than there is, or than a table of contents may hold."""

    def __init__(self, file: IO[bytes], size_bytes: int) -> None:
        self._file, self._size_bytes = file, size_bytes
        self.most_bytes = _MOST_DIRECTORY_BYTES
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._size_bytes - self._file.tell())
        size = rest if size < 0 else min(size, rest)
        if size > self.most_bytes:
            raise zipfile.BadZipFile(f"a table of contents of {size} bytes")
        return self._file.read(size)


def ends_plainly(data: bytes) -> bool:
    """Whether the ZIP ends as ZIPs do, with its end record and no comment, so that all readers see the same one."""
    return data[-22:-18] == b"PK\5\6" and data[-2:] == b"\0\0"


def _check_sum(infos: Sequence[zipfile.ZipInfo], size_bytes: int, always_allowed_bytes: int) -> None:
    if len(infos) > _MOST_MEMBERS:
        raise ZipError(f"has {len(infos)} members, more than {_MOST_MEMBERS}")
    total = sum(info.file_size for info in infos)
    if total > max(always_allowed_bytes, _MOST_RATIO * size_bytes):
        raise ZipError(f"unpacks from {size_bytes} to {total} bytes, a likely bomb")


def _check(info: zipfile.ZipInfo, directory_start: int) -> None:
    name = quoted(info.filename)
    if info.flag_bits & _ENCRYPTED:
        raise ZipError(f"has an encrypted member {name}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ZipError(
            f"has a member {name} of compression method {info.compress_type}; only stored and deflated ones are read"
        )
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        raise ZipError(f"has a member {name} that states two sizes")
    if not 0 <= info.header_offset < directory_start:
        raise ZipError(f"has a member {name} that lies outside of the file")
