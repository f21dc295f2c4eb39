"""What is particular to folders: links, permissions, temporary files, the disk."""

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from fleetpress.storage import local
from fleetpress.storage.errors import (
    AccessDenied,
    InvalidUri,
    NotWritable,
    ObjectNotFound,
    SourceChanged,
    StorageError,
    StoreUnreachable,
    UploadGone,
)
from fleetpress.storage.etags import HASHED_BELOW_BYTES
from fleetpress.storage.local import FolderStore
from fleetpress.storage.store import Unfinished


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


def test_links_are_followed_to_the_blobs_of_a_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = (tmp_path / "models--o--n" / part for part in ("blobs", "snapshots/0123456789abcdef"))
    blobs.mkdir(parents=True)
    (blobs / "1").write_bytes(b"weights")
    folder = FolderStore(str(snapshot))
    folder.put("x", b"1")
    folder.put("sub/y", b"2")
    os.symlink("../../blobs/1", snapshot / "model.safetensors")
    os.symlink("../../../blobs/1", snapshot / "sub" / "model.safetensors")
    assert folder.get("model.safetensors") == b"weights"
    assert [info.key for info in folder.list()] == [
        "model.safetensors",
        "sub/model.safetensors",
        "sub/y",
        "x",
    ]
    assert FolderStore(str(snapshot / "sub")).get("model.safetensors") == b"weights"


def test_links_are_followed_within_the_folder(folder: FolderStore) -> None:
    folder.put("a/x", b"1")
    os.symlink("a/x", Path(folder.uri, "link"))
    os.symlink("a", Path(folder.uri, "more"))
    assert folder.get("link") == b"1"
    assert [info.key for info in folder.list()] == ["a/x", "link", "more/x"]


def test_links_out_of_the_folder_are_refused(folder: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_bytes(b"secret")
    folder.put("x", b"1")
    os.symlink(tmp_path / "private" / "key", Path(folder.uri, "tokenizer.json"))
    os.symlink("../private", Path(folder.uri, "more"))
    for action in (folder.get, folder.head):
        for key in ("tokenizer.json", "more", "more/key"):
            with pytest.raises(AccessDenied, match=r"leads out of .*put a copy there"):
                action(key)
    # It is told when they are read, so that they spoil only their own model.
    assert {info.key: info.etag != "" for info in folder.list()} == {
        "more": False,
        "tokenizer.json": False,
        "x": True,
    }
    assert list(folder.sizes()) == ["more", "tokenizer.json", "x"]
    assert folder.list_unfinished() == []


def test_what_killed_writers_left_is_listed_and_discarded(folder: FolderStore) -> None:
    folder.put("a/x", b"1")
    upload = folder.create_upload("a/big")
    folder.upload_part("a/big", upload, number=1, offset=0, data=b"p" * 5000)
    Path(folder.uri, "a", ".fleetpress-tmp-0123").write_bytes(b"torn")
    torn, begun = sorted(folder.list_unfinished(), key=lambda item: item.upload)
    assert (torn.upload, torn.place, begun.upload) == ("", "a/.fleetpress-tmp-0123", upload)
    assert begun.size_bytes >= 5000
    for item in (torn, begun, begun):
        folder.discard(item)
    assert folder.list_unfinished() == []
    assert not folder.upload_exists("a/big", upload)
    assert [info.key for info in folder.list()] == ["a/x"]


@pytest.mark.parametrize("place", ["a/x", "../x", "/etc/passwd", "a/.fleetpress-tmp-1/../x", ""])
def test_nothing_else_can_be_discarded(folder: FolderStore, place: str) -> None:
    folder.put("a/x", b"1")
    with pytest.raises(InvalidUri):
        folder.discard(Unfinished(key="a/x", upload="", place=place))
    assert folder.get("a/x") == b"1"


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


def test_large_files_are_not_read_for_their_etag(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"x" * HASHED_BELOW_BYTES
    first = folder.put("x", data)
    monkeypatch.setattr("fleetpress.storage.etags._hash", _fail_with(errno.EIO))
    assert folder.head("x") == folder.list()[0] == first
    assert folder.get_range("x", 5, 2, etag=first.etag) == b"xx"
    status = Path(folder.uri, "x").stat()
    assert first.etag == f"{status.st_mtime_ns:x}-{len(data):x}"
    os.utime(Path(folder.uri, "x"), ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(SourceChanged, match="has changed"):
        folder.read_into("x", 5, memoryview(bytearray(2)), etag=first.etag)


@pytest.mark.parametrize("size_bytes", [100, HASHED_BELOW_BYTES])
def test_a_file_that_changes_under_a_pinned_read(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    info = folder.put("x", b"x" * size_bytes)
    etag_of_file = local.etag_of_file

    def then_change(file: BinaryIO, path: str) -> tuple[str, int]:
        found = etag_of_file(file, path)
        with open(path, "r+b") as same:
            same.write(b"y")
        os.utime(path, ns=(0, 0))
        return found

    monkeypatch.setattr(local, "etag_of_file", then_change)
    with pytest.raises(SourceChanged, match="was changed while it was read"):
        folder.read_into("x", 0, memoryview(bytearray(5)), etag=info.etag)


def test_an_upload_is_an_invisible_file(folder: FolderStore) -> None:
    upload_id = folder.create_upload("a/x")
    etag = folder.upload_part("a/x", upload_id, number=2, offset=1 << 30, data=b"far away")
    (temporary,) = os.listdir(Path(folder.uri, "a"))
    assert temporary == f".fleetpress-tmp-upload-{upload_id}"
    status = Path(folder.uri, "a", temporary).stat()
    assert status.st_size == (1 << 30) + 8
    assert status.st_blocks * 512 < 1 << 20  # sparse
    assert folder.list() == []
    with pytest.raises(InvalidUri, match="unfinished"):
        folder.get(f"a/{temporary}")
    with pytest.raises(UploadGone, match="part 1 of its upload starts at byte"):
        folder.complete_upload("a/x", upload_id, [etag])
    folder.abort_upload("a/x", upload_id)
    assert os.listdir(Path(folder.uri, "a")) == []


@pytest.mark.parametrize("upload_id", ["", "../x", "A" * 40, "0" * 39, "0" * 40 + "\n", "\0" * 40])
def test_ids_that_are_no_names(folder: FolderStore, upload_id: str) -> None:
    folder.put("a/x", b"1")
    assert not folder.upload_exists("a/x", upload_id)
    folder.abort_upload("a/x", upload_id)
    with pytest.raises(UploadGone, match="no upload of this id"):
        folder.upload_part("a/x", upload_id, number=1, offset=0, data=b"1")
    with pytest.raises(UploadGone, match="no upload of this id"):
        folder.complete_upload("a/x", upload_id, [])


def test_completed_but_its_caller_did_not_live_to_say_so(folder: FolderStore) -> None:
    upload_id = folder.create_upload("x")
    etags = [
        folder.upload_part("x", upload_id, number=1, offset=0, data=b"first"),
        folder.upload_part("x", upload_id, number=2, offset=5, data=b"second"),
    ]
    info = folder.complete_upload("x", upload_id, etags)
    assert folder.complete_upload("x", upload_id, etags) == info
    for other in (b"firstSecond", b"firstsecond.", b"first"):
        folder.put("x", other)
        with pytest.raises(UploadGone, match="completed or aborted by someone else: run again"):
            folder.complete_upload("x", upload_id, etags)
    folder.delete("x")
    with pytest.raises(UploadGone):
        folder.complete_upload("x", upload_id, etags)


def test_a_part_that_never_came(folder: FolderStore) -> None:
    upload_id, other = folder.create_upload("x"), folder.create_upload("x")
    etags = [
        folder.upload_part("x", upload_id, number=1, offset=0, data=b"first"),
        folder.upload_part("x", other, number=2, offset=5, data=b"second"),
    ]
    with pytest.raises(UploadGone, match="does not hold the 11 bytes recorded: run again"):
        folder.complete_upload("x", upload_id, etags)
    assert folder.list() == []


def test_an_upload_that_fails_goes_on(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_id = folder.create_upload("a/x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fail_with(errno.ENOSPC))
        with pytest.raises(NotWritable, match=r"a/x .*disk is full"):
            folder.upload_part("a/x", upload_id, number=1, offset=0, data=b"1")
    etag = folder.upload_part("a/x", upload_id, number=1, offset=0, data=b"1")
    folder.put("a/x/in-the-way", b"")
    with pytest.raises(NotWritable, match="folder of that name"):
        folder.complete_upload("a/x", upload_id, [etag])
    folder.delete("a/x/in-the-way")
    Path(folder.uri, "a", "x").rmdir()
    assert folder.complete_upload("a/x", upload_id, [etag]).size_bytes == 1
    with pytest.raises(NotWritable, match="part of its path is a file"):
        folder.create_upload("a/x/below")


def test_a_write_of_less_than_all(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    upload_id = folder.create_upload("x")
    etag = folder.upload_part("x", upload_id, number=1, offset=0, data=b"0123456789")
    folder.complete_upload("x", upload_id, [etag])
    assert folder.get("x") == b"0123456789"


def test_every_step_of_an_upload_is_synced(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of a part must not outlive its bytes, nor the name of the file that they are in."""
    synced: list[int] = []
    fsync = os.fsync
    for module, name in ((os, "fsync"), (local, "_sync_data")):
        monkeypatch.setattr(module, name, lambda file: synced.append(os.fstat(file).st_ino) or fsync(file))
    upload_id = folder.create_upload("a/x")
    root = Path(folder.uri)
    assert synced == [path.stat().st_ino for path in (root.parent, root, root / "a")]
    synced.clear()
    etag = folder.upload_part("a/x", upload_id, number=1, offset=0, data=b"1")
    folder.complete_upload("a/x", upload_id, [etag])
    file = (root / "a" / "x").stat().st_ino
    assert synced == [file, file, (root / "a").stat().st_ino]
