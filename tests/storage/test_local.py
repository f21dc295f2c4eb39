"""What is particular to folders: links, permissions, temporary files, the disk."""

import errno
import os
from pathlib import Path

import pytest

from fleetpress.storage.errors import (
    AccessDenied,
    InvalidUri,
    NotWritable,
    ObjectNotFound,
    StorageError,
    StoreUnreachable,
)
from fleetpress.storage.local import FolderStore


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    return FolderStore(str(tmp_path / "store"))


def _fail_with(number: int) -> object:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_dangling_link(folder: FolderStore) -> None:
    folder.put("x", b"1")
    os.symlink("nowhere", Path(folder.uri, "link"))
    for action in (folder.get, folder.head):
        with pytest.raises(ObjectNotFound, match="link to nowhere"):
            action("link")
    assert [info.key for info in folder.list()] == ["x"]


def test_links_are_followed(folder: FolderStore, tmp_path: Path) -> None:
    """A hub cache is a folder of links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(b"weights")
    folder.put("x", b"1")
    os.symlink(tmp_path / "blobs" / "1", Path(folder.uri, "model.safetensors"))
    os.symlink(tmp_path / "blobs", Path(folder.uri, "more"))
    assert folder.get("model.safetensors") == b"weights"
    assert [info.key for info in folder.list()] == ["model.safetensors", "more/1", "x"]


def test_a_write_replaces_the_link_and_not_its_target(folder: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    folder.put("x", b"1")
    os.symlink(tmp_path / "precious", Path(folder.uri, "link"))
    folder.put("link", b"new")
    assert folder.get("link") == b"new"
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_link_cycles_end(folder: FolderStore) -> None:
    folder.put("a/b/x", b"1")
    os.symlink("..", Path(folder.uri, "a/b/up"))
    os.symlink("self", Path(folder.uri, "self"))
    assert [info.key for info in folder.list()] == ["a/b/x"]
    with pytest.raises(ObjectNotFound, match="leads to itself"):
        folder.get("self")


def test_a_pipe_is_no_object(folder: FolderStore) -> None:
    folder.put("x", b"1")
    os.mkfifo(Path(folder.uri, "pipe"))
    with pytest.raises(ObjectNotFound, match="pipe"):
        folder.get("pipe")
    assert [info.key for info in folder.list()] == ["x"]


def test_names_that_are_no_keys_are_left_out(folder: FolderStore) -> None:
    folder.put("x", b"1")
    for name in (b"new\nline", b"back\\slash", b"not-utf8-\xff"):
        Path(os.fsdecode(os.path.join(folder.uri.encode(), name))).write_bytes(b"")
    assert [info.key for info in folder.list()] == ["x"]


def test_temporary_files_are_invisible(folder: FolderStore) -> None:
    folder.put("x", b"1")
    Path(folder.uri, ".fleetpress-tmp-abc").write_bytes(b"half")
    assert [info.key for info in folder.list()] == ["x"]
    with pytest.raises(InvalidUri, match="unfinished"):
        folder.get(".fleetpress-tmp-abc")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_bytes(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder.put("x", b"old")
    monkeypatch.setattr(os, step, _fail_with(errno.ENOSPC))
    with pytest.raises(NotWritable, match=r"store/x .*disk is full"):
        folder.put("x", b"new")
    monkeypatch.undo()
    assert folder.get("x") == b"old"
    assert os.listdir(folder.uri) == ["x"]


def test_a_file_where_a_folder_is_needed(folder: FolderStore) -> None:
    folder.put("a", b"1")
    with pytest.raises(NotWritable, match="part of its path is a file"):
        folder.put("a/b", b"2")
    folder.put("c/d", b"1")
    with pytest.raises(NotWritable, match="folder of that name"):
        folder.put("c", b"2")
    assert not folder.put_if_absent("c", b"2")
    with pytest.raises(ObjectNotFound, match="is a folder"):
        folder.get("c")


def test_without_hard_links_claims_are_refused(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _fail_with(errno.ENOTSUP))
    with pytest.raises(NotWritable, match="hard links"):
        folder.put_if_absent("x", b"1")
    probe = folder.probe()
    assert (probe.reachable, probe.writable, probe.conditional_writes) == (True, False, False)
    assert "hard links" in probe.problem
    monkeypatch.undo()
    assert folder.list() == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.ENAMETOOLONG, InvalidUri),
        (errno.EIO, StoreUnreachable),
        (errno.ESTALE, StoreUnreachable),
    ],
)
def test_read_errors(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    folder.put("x", b"1")
    monkeypatch.setattr("builtins.open", _fail_with(number))
    with pytest.raises(kind, match="store/x"):
        folder.get("x")
    monkeypatch.undo()
    monkeypatch.setattr(os, "scandir", _fail_with(number))
    with pytest.raises(kind, match="store"):
        folder.list()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM])
def test_write_errors(folder: FolderStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder.put("x", b"1")
    monkeypatch.setattr(os, "unlink", _fail_with(number))
    with pytest.raises(NotWritable, match="store/x"):
        folder.delete("x")
    monkeypatch.undo()
    monkeypatch.setattr(os, "mkdir", _fail_with(number))
    with pytest.raises(NotWritable, match="store/new/x"):
        folder.put("new/x", b"1")


def test_too_long_a_name(folder: FolderStore) -> None:
    with pytest.raises(InvalidUri, match="too long"):
        folder.put("n" * 300, b"1")
    with pytest.raises(InvalidUri, match="too long"):
        folder.head("n" * 300)


def test_permissions_follow_the_umask(folder: FolderStore) -> None:
    old = os.umask(0o027)
    try:
        folder.put("x", b"1")
    finally:
        os.umask(old)
    assert Path(folder.uri, "x").stat().st_mode & 0o777 == 0o640


def test_everything_is_synced(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino) or fsync(file))
    folder.put("a/x", b"1")
    root = Path(folder.uri)
    # The names of the new folders, the bytes (a rename keeps the inode), the name.
    assert synced == [path.stat().st_ino for path in (root.parent, root, root / "a" / "x", root / "a")]
