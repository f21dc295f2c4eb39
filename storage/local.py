"""A folder as an object store: same keys, same guarantees as S3; etags as `etags` says."""

import contextlib
import errno
import os
import re
import stat
import uuid
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedReader
from typing import BinaryIO, Literal

from .errors import (
    AccessDenied,
    InvalidUri,
    NotWritable,
    ObjectNotFound,
    SourceChanged,
    StorageError,
    StoreUnreachable,
    UploadGone,
)
from .etags import (
    HASHED_BELOW_BYTES,
    Part,
    etag_of_bytes,
    etag_of_file,
    etag_of_identity,
    identity_of,
    parse_parts,
)
from .store import MAX_PARTS, ObjectInfo, StoreProbe, bytes_of, flat_view, probe_store
from .uri import is_valid_key, normalize, validate_key

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the second
_TEMPORARY = ".fleetpress-tmp-"
_UPLOAD_ID = re.compile(r"[0-9a-f]{40}")
_PIECE_BYTES = 1 << 20

_READ_ERRORS: dict[int, tuple[type[StorageError], str]] = {
    errno.ENOENT: (ObjectNotFound, "no such file"),
    errno.ENOTDIR: (ObjectNotFound, "no such file: a part of its path is not a folder"),
    errno.EISDIR: (ObjectNotFound, "is a folder, not a file"),
    errno.ELOOP: (ObjectNotFound, "is a link that leads to itself"),
    errno.EACCES: (AccessDenied, "may not be read: check its permissions"),
    errno.EPERM: (AccessDenied, "may not be read: check its permissions"),
    errno.ENAMETOOLONG: (InvalidUri, "has a name that is too long for this file system"),
}
_WRITE_ERRORS: dict[int, tuple[type[StorageError], str]] = {
    errno.EACCES: (NotWritable, "may not be written: check the folder's permissions"),
    errno.EPERM: (
        NotWritable,
        "may not be written: check permissions, and that the file system has hard links",
    ),
    errno.EROFS: (NotWritable, "lies on a read-only file system"),
    errno.ENOSPC: (NotWritable, "does not fit: the disk is full"),
    errno.EDQUOT: (NotWritable, "does not fit: the disk quota is used up"),
    errno.ENOTSUP: (
        NotWritable,
        "lies on a file system without hard links: use another folder for the output",
    ),
    errno.ENOENT: (NotWritable, "cannot be created: its folder cannot be made"),
    errno.ENOTDIR: (NotWritable, "cannot be created: a part of its path is a file"),
    errno.EEXIST: (NotWritable, "cannot be created: a part of its path is a file"),
    errno.EISDIR: (NotWritable, "cannot be created: there is a folder of that name"),
    errno.ENAMETOOLONG: (InvalidUri, "has a name that is too long for this file system"),
}


class FolderStore:
    """Objects are the files below one folder, which need not exist before the first write.

    Links are followed (hub caches are made of them), so an object's bytes may lie elsewhere; its key cannot.
    """

    def __init__(self, uri: str) -> None:
        self.uri = os.path.abspath(normalize(uri))

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        with self._reading(self._path(key)) as file:
            return file.read()

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """See ObjectStore."""
        return bytes_of(lambda buffer: self.read_into(key, start, buffer, etag=etag), length)

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        """See ObjectStore."""
        assert start >= 0
        path = self._path(key)
        with self._reading(path) as file:
            before = identity_of(file.fileno())
            if etag is not None and etag_of_file(file, path)[0] != etag:
                raise SourceChanged(f"{path} has changed since this run planned with it: run again")
            file.seek(start)
            if file.readinto(buffer) != buffer.nbytes:
                raise SourceChanged(
                    f"{path} ends before byte {start + buffer.nbytes}: it was truncated, or its index is wrong"
                )
            if etag is not None and identity_of(file.fileno()) != before:
                raise SourceChanged(f"{path} was changed while it was read: run again")

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore. Reads a small file when its etag is not remembered."""
        return self._info(key, self._path(key))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """See ObjectStore. Leaves out dangling links; a folder that may not be read is AccessDenied."""
        found: list[ObjectInfo] = []
        for key, path in self._listed(prefix):
            with contextlib.suppress(ObjectNotFound):  # gone since the folder was read
                found.append(self._info(key, path))
        return found

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ObjectStore."""
        found: dict[str, int] = {}
        for key, path in self._listed(prefix):
            with contextlib.suppress(FileNotFoundError):  # gone since the folder was read
                found[key] = os.stat(path).st_size
        return found

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """See ObjectStore. A temporary file in the same folder is renamed once its bytes are on the disk."""
        path = self._path(key)
        with _temporary_file(path, data) as temporary:
            small = len(data) < HASHED_BELOW_BYTES
            etag = etag_of_bytes(data) if small else etag_of_identity(identity_of(temporary))
            os.replace(temporary, path)
            _sync_folder(os.path.dirname(path))
        return ObjectInfo(key=key, size_bytes=len(data), etag=etag)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore. A hard link is the one call that both publishes whole bytes and refuses to replace."""
        path = self._path(key)
        with _temporary_file(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            else:
                _sync_folder(os.path.dirname(path))
                return True
        try:
            return self.get(key) == data
        except ObjectNotFound:
            return False  # removed, or a folder: in any case not ours

    def create_upload(self, key: str) -> str:
        """See ObjectStore. A sparse temporary file beside the target, which every part is written into."""
        path = self._path(key)
        upload_id = f"{uuid.uuid4().hex}{zlib.crc32(key.encode()):08x}"
        with _writing(path):
            _make_folders(os.path.dirname(path))
            with open(self._upload_path(key, upload_id), "xb"):
                _sync_folder(os.path.dirname(path))
        return upload_id

    def upload_part(
        self, key: str, upload_id: str, *, number: int, offset: int, data: memoryview | bytes
    ) -> str:
        """See ObjectStore. The bytes are on the disk when it returns: a record of them never outlives them."""
        assert 1 <= number <= MAX_PARTS
        assert offset >= 0
        view = flat_view(data)
        part = Part(offset, len(view), zlib.crc32(view))
        with self._upload(key, upload_id, "r+b") as file:
            while view:
                written = os.pwrite(file.fileno(), view, offset)
                view, offset = view[written:], offset + written
            _sync_data(file.fileno())  # in parts it costs less than once at the end: others compute meanwhile
        return str(part)

    def upload_exists(self, key: str, upload_id: str) -> bool:
        """See ObjectStore."""
        try:
            with self._upload(key, upload_id, "rb"):
                return True
        except UploadGone:
            return False

    def complete_upload(self, key: str, upload_id: str, etags: Sequence[str]) -> ObjectInfo:
        """See ObjectStore."""
        path = self._path(key)
        parts = parse_parts(etags, path)
        size_bytes = sum(part.size_bytes for part in parts)
        try:
            with self._upload(key, upload_id, "rb") as file:
                if os.fstat(file.fileno()).st_size != size_bytes:
                    raise UploadGone(
                        f"{path}: its upload does not hold the {size_bytes} bytes recorded: run again"
                    )
                os.fsync(file.fileno())
                etag, _ = etag_of_file(file, path)
                os.replace(file.name, path)
                _sync_folder(os.path.dirname(path))
        except UploadGone:
            if not self._holds(key, parts, size_bytes):
                raise
            return self.head(key)
        return ObjectInfo(key=key, size_bytes=size_bytes, etag=etag)

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See ObjectStore."""
        with contextlib.suppress(UploadGone), self._upload(key, upload_id, "rb") as file:
            os.unlink(file.name)

    def delete(self, key: str) -> None:
        """See ObjectStore. Folders stay: another writer may be about to use them."""
        path = self._path(key)
        with _writing(path), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            os.unlink(path)
            _sync_folder(os.path.dirname(path))

    def probe(self) -> StoreProbe:
        """See ObjectStore."""
        return probe_store(self)

    def _listed(self, prefix: str) -> Sequence[tuple[str, str]]:
        """Keys that start with the prefix, and their paths, by the bytes of the key."""
        folder, slash, name = prefix.rpartition("/")
        if slash and not is_valid_key(folder):
            return []
        start = os.path.join(self.uri, folder) if folder else self.uri
        paths = list(_files(start, name, frozenset()))
        keys = (os.path.relpath(path, self.uri).replace(os.sep, "/") for path in paths)
        found = [(key, path) for key, path in zip(keys, paths, strict=True) if is_valid_key(key)]
        return sorted(found, key=lambda pair: pair[0].encode())

    def _path(self, key: str) -> str:
        validate_key(key)
        if _is_temporary(key.rpartition("/")[2]):
            raise InvalidUri(
                f"object key {key!r}: names starting with {_TEMPORARY!r} are kept for unfinished writes"
            )
        return os.path.join(self.uri, *key.split("/"))

    def _upload_path(self, key: str, upload_id: str) -> str:
        """The file of an upload; an id ends in the CRC-32 of its key, so that it opens no other key's upload."""
        path = self._path(key)
        if not _UPLOAD_ID.fullmatch(upload_id) or int(upload_id[-8:], 16) != zlib.crc32(key.encode()):
            raise UploadGone(f"{path} has no upload of this id: run again")
        return os.path.join(os.path.dirname(path), f"{_TEMPORARY}upload-{upload_id}")

    @contextlib.contextmanager
    def _upload(self, key: str, upload_id: str, mode: Literal["rb", "r+b"]) -> Iterator[BinaryIO]:
        path, temporary = self._path(key), self._upload_path(key, upload_id)
        with _writing(path):
            try:
                with open(temporary, mode) as file:
                    yield file
            except (FileNotFoundError, NotADirectoryError) as error:
                raise UploadGone(
                    f"{path}: its upload was completed or aborted by someone else: run again"
                ) from error

    def _holds(self, key: str, parts: Sequence[Part], size_bytes: int) -> bool:
        """Whether the object is what the parts make: the rename happened, but its caller did not live to say so."""
        try:
            with self._reading(self._path(key)) as file:
                return os.fstat(file.fileno()).st_size == size_bytes and all(
                    _crc32_of_next(file, part.size_bytes) == part.crc32 for part in parts
                )
        except ObjectNotFound:
            return False

    def _info(self, key: str, path: str) -> ObjectInfo:
        with self._reading(path) as file:
            etag, size_bytes = etag_of_file(file, path)
        return ObjectInfo(key=key, size_bytes=size_bytes, etag=etag)

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[BufferedReader]:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
                raise ObjectNotFound(
                    f"{path} is a device or pipe, not a file"
                )  # opening a pipe would wait for ever
            with open(path, "rb") as file:
                yield file
        except OSError as error:
            if isinstance(error, FileNotFoundError) and os.path.islink(path):
                raise ObjectNotFound(
                    f"{path} is a link to {os.readlink(path)}, which does not exist"
                ) from error
            raise _translated(error, path, _READ_ERRORS) from error


def _files(folder: str, name_prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Paths of the files at any depth whose first name below `folder` starts with `name_prefix`."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a folder that is being listed
            return
        with os.scandir(folder) as entries:
            paths = [entry.path for entry in entries if entry.name.startswith(name_prefix)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _translated(error, folder, _READ_ERRORS) from error
    for path in paths:
        if os.path.isdir(path):
            yield from _files(path, "", above | {here})
        elif not _is_temporary(os.path.basename(path)) and os.path.isfile(path):
            yield path


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY)


@contextlib.contextmanager
def _temporary_file(path: str, data: bytes) -> Iterator[str]:
    """A file beside `path` that holds `data` on disk, gone at the end; what goes wrong inside is a write to `path`."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, _TEMPORARY + uuid.uuid4().hex)
    try:
        with _writing(path):
            _make_folders(folder)
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _translated(error, path, _WRITE_ERRORS) from error


def _crc32_of_next(file: BufferedReader, size_bytes: int) -> int:
    crc32, buffer = 0, memoryview(bytearray(_PIECE_BYTES))
    while size_bytes:
        count = file.readinto(buffer[:size_bytes])
        if not count:
            break
        crc32, size_bytes = zlib.crc32(buffer[:count], crc32), size_bytes - count
    return crc32


def _make_folders(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folders(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    """A rename or a new name is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _translated(error: OSError, path: str, table: dict[int, tuple[type[StorageError], str]]) -> StorageError:
    kind, text = table.get(error.errno or 0, (StoreUnreachable, f"failed: {error.strerror or error}"))
    return kind(f"{path} {text}")
