"""A folder as an object store: same keys, same guarantees as S3; etags as `etags` says."""

import contextlib
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
    ObjectNotFound,
    SourceChanged,
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
from .local_files import (
    READ_ERRORS,
    TEMPORARY,
    crc32_of_next,
    files,
    is_temporary,
    make_folders,
    sync_folder,
    temporary_file,
    translated,
    writing,
)
from .local_links import check_inside
from .store import MAX_PARTS, ObjectInfo, StoreProbe, Unfinished, bytes_of, check_size, flat_view, probe_store
from .traffic import note_read, note_written
from .uri import is_valid_key, normalize, validate_key

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the second
_UPLOAD_ID = re.compile(r"[0-9a-f]{40}")
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own


class FolderStore:
    """Objects are the files below one folder, which need not exist before the first write.

    Links are followed as far as they stay below it, or lead to the blobs of the Hugging Face cache that it is part of;
    all others are refused: what a stranger's folder links to would be published.
    """

    def __init__(self, uri: str) -> None:
        self.uri = os.path.abspath(normalize(uri))

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        """See ObjectStore."""
        path = self._path(key)
        with self._reading(path) as file:
            before = identity_of(file.fileno())
            self._check_etag(file, path, etag)
            check_size(path, file.seek(0, os.SEEK_END), most_bytes)
            file.seek(0)
            data = file.read()
            self._check_untouched(file, path, etag, before)
        note_read(len(data))
        return data

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """See ObjectStore."""
        return bytes_of(lambda buffer: self.read_into(key, start, buffer, etag=etag), length)

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        """See ObjectStore."""
        assert start >= 0
        path = self._path(key)
        with self._reading(path) as file:
            before = identity_of(file.fileno())
            self._check_etag(file, path, etag)
            file.seek(start)
            if file.readinto(buffer) != buffer.nbytes:
                raise SourceChanged(
                    f"{path} ends before byte {start + buffer.nbytes}: it was truncated, or its index is wrong"
                )
            self._check_untouched(file, path, etag, before)
        note_read(buffer.nbytes)

    def stored_crc32(self, key: str, *, etag: str) -> tuple[int, int] | None:
        """See ObjectStore. File systems keep none that could be asked for."""
        path = self._path(key)
        with self._reading(path) as file:
            self._check_etag(file, path, etag)
        return None

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore. Reads a small file when its etag is not remembered."""
        return self._info(key, self._path(key))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """See ObjectStore. Leaves out dangling links; a folder that may not be read is AccessDenied."""
        found: list[ObjectInfo] = []
        for key, path in self._listed(prefix):
            with contextlib.suppress(ObjectNotFound):  # gone since the folder was read
                found.append(self._listed_info(key, path))
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
        with temporary_file(path, data) as temporary:
            small = len(data) < HASHED_BELOW_BYTES
            etag = etag_of_bytes(data) if small else etag_of_identity(identity_of(temporary))
            os.replace(temporary, path)
            sync_folder(os.path.dirname(path))
        note_written(len(data))
        return ObjectInfo(key=key, size_bytes=len(data), etag=etag)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore. A hard link is the one call that both publishes whole bytes and refuses to replace."""
        path = self._path(key)
        with temporary_file(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            else:
                sync_folder(os.path.dirname(path))
                note_written(len(data))
                return True
        try:
            return self.get(key) == data
        except ObjectNotFound:
            return False  # removed, or a folder: in any case not ours

    def create_upload(self, key: str) -> str:
        """See ObjectStore. A sparse temporary file beside the target, which every part is written into."""
        path = self._path(key)
        upload_id = f"{uuid.uuid4().hex}{zlib.crc32(key.encode()):08x}"
        with writing(path):
            make_folders(os.path.dirname(path))
            with open(self._upload_path(key, upload_id), "xb"):
                sync_folder(os.path.dirname(path))
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
        note_written(part.size_bytes)
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
                sync_folder(os.path.dirname(path))
        except UploadGone:
            if not self._holds(key, parts, size_bytes):
                raise
            return self.head(key)
        return ObjectInfo(key=key, size_bytes=size_bytes, etag=etag)

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See ObjectStore."""
        with contextlib.suppress(UploadGone), self._upload(key, upload_id, "rb") as file:
            os.unlink(file.name)

    def list_unfinished(self) -> Sequence[Unfinished]:
        """See ObjectStore."""
        found = []
        for path in sorted(files(self.uri, self.uri, "", temporary=True)):
            place = os.path.relpath(path, self.uri).replace(os.sep, "/")
            upload = place.rpartition("/")[2].removeprefix(TEMPORARY).removeprefix("upload-")
            with contextlib.suppress(FileNotFoundError):  # its writer has just ended
                found.append(
                    Unfinished(
                        key=place.rpartition("/")[0],
                        upload=upload if _UPLOAD_ID.fullmatch(upload) else "",
                        place=place,
                        size_bytes=os.stat(path).st_blocks * _BLOCK_BYTES,
                    )
                )
        return found

    def discard(self, item: Unfinished) -> None:
        """See ObjectStore. Removes files of unfinished writes and nothing else."""
        folder, _, name = validate_key(item.place).rpartition("/")
        if not is_temporary(name):
            raise InvalidUri(f"{item.place!r} is no unfinished write")
        path = os.path.join(self.uri, *folder.split("/"), name)
        with writing(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)

    def delete(self, key: str) -> None:
        """See ObjectStore. Folders stay: another writer may be about to use them."""
        path = self._path(key)
        with writing(path), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            os.unlink(path)
            sync_folder(os.path.dirname(path))

    def probe(self) -> StoreProbe:
        """See ObjectStore."""
        return probe_store(self)

    def _listed(self, prefix: str) -> Sequence[tuple[str, str]]:
        """Keys that start with the prefix, and their paths, by the bytes of the key."""
        folder, slash, name = prefix.rpartition("/")
        if slash and not is_valid_key(folder):
            return []
        start = os.path.join(self.uri, folder) if folder else self.uri
        paths = list(files(self.uri, start, name))
        keys = (os.path.relpath(path, self.uri).replace(os.sep, "/") for path in paths)
        found = [(key, path) for key, path in zip(keys, paths, strict=True) if is_valid_key(key)]
        return sorted(found, key=lambda pair: pair[0].encode())

    def _check_etag(self, file: BufferedReader, path: str, etag: str | None) -> None:
        if etag is not None and etag_of_file(file, path)[0] != etag:
            raise SourceChanged(f"{path} has changed since this run planned with it: run again")

    def _check_untouched(self, file: BufferedReader, path: str, etag: str | None, before: object) -> None:
        if etag is not None and identity_of(file.fileno()) != before:
            raise SourceChanged(f"{path} was changed while it was read: run again")

    def _path(self, key: str) -> str:
        validate_key(key)
        if is_temporary(key.rpartition("/")[2]):
            raise InvalidUri(
                f"object key {key!r}: names starting with {TEMPORARY!r} are kept for unfinished writes"
            )
        return os.path.join(self.uri, *key.split("/"))

    def _upload_path(self, key: str, upload_id: str) -> str:
        """The file of an upload; an id ends in the CRC-32 of its key, so that it opens no other key's upload."""
        path = self._path(key)
        if not _UPLOAD_ID.fullmatch(upload_id) or int(upload_id[-8:], 16) != zlib.crc32(key.encode()):
            raise UploadGone(f"{path} has no upload of this id: run again")
        return os.path.join(os.path.dirname(path), f"{TEMPORARY}upload-{upload_id}")

    @contextlib.contextmanager
    def _upload(self, key: str, upload_id: str, mode: Literal["rb", "r+b"]) -> Iterator[BinaryIO]:
        path, temporary = self._path(key), self._upload_path(key, upload_id)
        with writing(path):
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
                    crc32_of_next(file, part.size_bytes) == part.crc32 for part in parts
                )
        except ObjectNotFound:
            return False

    def _listed_info(self, key: str, path: str) -> ObjectInfo:
        """As `_info`, but one file that may not be read does not spoil the list: whoever reads it is told."""
        try:
            return self._info(key, path)
        except AccessDenied:
            return ObjectInfo(key=key, size_bytes=os.lstat(path).st_size, etag="")

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
            check_inside(path, self.uri)
            with open(path, "rb") as file:
                yield file
        except OSError as error:
            if isinstance(error, FileNotFoundError) and os.path.islink(path):
                raise ObjectNotFound(
                    f"{path} is a link to {os.readlink(path)}, which does not exist"
                ) from error
            raise translated(error, path, READ_ERRORS) from error
