"""Files as the folder store needs them: walked, written whole or not at all, their errors in this package's words."""

import contextlib
import errno
import os
import uuid
import zlib
from collections.abc import Iterator
from io import BufferedReader

from .errors import AccessDenied, InvalidUri, NotWritable, ObjectNotFound, StorageError, StoreUnreachable
from .local_links import is_inside

TEMPORARY = ".fleetpress-tmp-"
_PIECE_BYTES = 1 << 20

READ_ERRORS: dict[int, tuple[type[StorageError], str]] = {
    errno.ENOENT: (ObjectNotFound, "no such file"),
    errno.ENOTDIR: (ObjectNotFound, "no such file: a part of its path is not a folder"),
    errno.EISDIR: (ObjectNotFound, "is a folder, not a file"),
    errno.ELOOP: (ObjectNotFound, "is a link that leads to itself"),
    errno.EACCES: (AccessDenied, "may not be read: check its permissions"),
    errno.EPERM: (AccessDenied, "may not be read: check its permissions"),
    errno.ENAMETOOLONG: (InvalidUri, "has a name that is too long for this file system"),
}
WRITE_ERRORS: dict[int, tuple[type[StorageError], str]] = {
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


def files(
    root: str,
    folder: str,
    name_prefix: str,
    *,
    temporary: bool = False,
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[str]:
    """Paths of the files at any depth whose first name below `folder` starts with `name_prefix`.

    Either those that hold objects or, with `temporary`, those of unfinished writes. Of a link to a folder that lies
    outside of `root` the link alone: whoever reads that is told, and so does not miss what is behind it.
    """
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
        raise translated(error, folder, READ_ERRORS) from error
    for path in paths:
        if os.path.isdir(path):
            if is_inside(path, root):
                yield from files(root, path, "", temporary=temporary, above=above | {here})
            elif not temporary:
                yield path
        elif is_temporary(os.path.basename(path)) == temporary and os.path.isfile(path):
            yield path


def check_writable(folder: str) -> None:
    """NotWritable if it can be told without writing that nothing can be written below `folder`."""
    place = folder
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise translated(OSError(errno.ENOTDIR, ""), folder, WRITE_ERRORS)
    if not os.access(place, os.W_OK | os.X_OK):
        raise translated(OSError(errno.EACCES, ""), folder, WRITE_ERRORS)


def is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY)


@contextlib.contextmanager
def temporary_file(path: str, data: bytes) -> Iterator[str]:
    """A file beside `path` that holds `data` on disk, gone at the end; what goes wrong inside is a write to `path`."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, TEMPORARY + uuid.uuid4().hex)
    try:
        with writing(path):
            make_folders(folder)
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translated(error, path, WRITE_ERRORS) from error


def crc32_of_next(file: BufferedReader, size_bytes: int) -> int:
    crc32, buffer = 0, memoryview(bytearray(_PIECE_BYTES))
    while size_bytes:
        count = file.readinto(buffer[:size_bytes])
        if not count:
            break
        crc32, size_bytes = zlib.crc32(buffer[:count], crc32), size_bytes - count
    return crc32


def make_folders(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    make_folders(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    sync_folder(parent)


def sync_folder(folder: str) -> None:
    """A rename or a new name is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def translated(error: OSError, path: str, table: dict[int, tuple[type[StorageError], str]]) -> StorageError:
    kind, text = table.get(error.errno or 0, (StoreUnreachable, f"failed: {error.strerror or error}"))
    return kind(f"{path} {text}")
