"""Etags of files: the MD5 of small ones, hashed once while the file stays as it is; time and size of large ones."""

import hashlib
import os
from pathlib import Path

import pytest

from fleetpress.storage import etags
from fleetpress.storage.errors import UploadGone
from fleetpress.storage.etags import (
    HASHED_BELOW_BYTES,
    Part,
    etag_of_bytes,
    etag_of_file,
    etag_of_identity,
    identity_of,
    parse_parts,
)

_LATER_NS = 10_000_000_000


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a file is really read."""
    reads: list[int] = []
    hash_file = etags._hash
    monkeypatch.setattr(etags, "_hash", lambda file: reads.append(1) or hash_file(file))
    return reads


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every file look old enough to be remembered."""
    now = etags.time.time_ns
    monkeypatch.setattr(etags.time, "time_ns", lambda: now() + _LATER_NS)


def _etag(path: Path) -> str:
    with path.open("rb") as file:
        etag, size_bytes = etag_of_file(file, str(path))
    assert size_bytes == path.stat().st_size
    return etag


@pytest.mark.parametrize("size_bytes", [0, 1, 1 << 20, (1 << 20) + 1, HASHED_BELOW_BYTES - 1])
def test_is_the_md5(tmp_path: Path, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    (tmp_path / "f").write_bytes(data)
    assert _etag(tmp_path / "f") == hashlib.md5(data).hexdigest() == etag_of_bytes(data)


def test_large_files_are_not_read(tmp_path: Path, hashed: list[int]) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(HASHED_BELOW_BYTES))
    os.utime(path, ns=(1, 0x123456789ABCDEF0))
    assert _etag(path) == "123456789abcdef0-800000" == etag_of_identity(identity_of(str(path)))
    os.utime(path, ns=(1, 0x123456789ABCDEF1))
    assert _etag(path) == "123456789abcdef1-800000"
    path.write_bytes(bytes(HASHED_BELOW_BYTES + 1))
    os.utime(path, ns=(1, 0x123456789ABCDEF1))
    assert _etag(path) == "123456789abcdef1-800001"
    assert not hashed


def test_young_files_are_hashed_every_time(tmp_path: Path, hashed: list[int]) -> None:
    (tmp_path / "f").write_bytes(b"small")
    assert _etag(tmp_path / "f") == _etag(tmp_path / "f")
    assert len(hashed) == 2


@pytest.mark.usefixtures("later")
def test_old_files_are_hashed_once(tmp_path: Path, hashed: list[int]) -> None:
    (tmp_path / "f").write_bytes(b"small")
    assert _etag(tmp_path / "f") == _etag(tmp_path / "f")
    assert len(hashed) == 1


@pytest.mark.usefixtures("later")
def test_same_size_and_mtime_but_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"aaaaa")
    os.utime(path, ns=(10**18, 10**18))
    first = _etag(path)
    with path.open("r+b") as file:  # in place: the inode stays as well
        file.write(b"bbbbb")
    os.utime(path, ns=(10**18, 10**18))
    assert _etag(path) == etag_of_bytes(b"bbbbb") != first


@pytest.mark.usefixtures("later")
def test_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"small")
    _etag(path)
    (tmp_path / "new").write_bytes(b"smalL")
    os.replace(tmp_path / "new", path)
    assert _etag(path) == etag_of_bytes(b"smalL")


def test_parts_survive_their_text() -> None:
    parts = [
        Part(0, 5, 0),
        Part(5, 1 << 33, 2**32 - 1, "d41d8cd98f00b204e9800998ecf8427e-2-x"),
        Part(5 + 2**33, 0, 7),
    ]
    texts = [str(part) for part in parts]
    assert texts[0] == "0-5-00000000-"
    assert parse_parts(texts, "k") == parts
    assert parse_parts([], "k") == []


@pytest.mark.parametrize("text", ["", "x", "0-1-2", "g-1-00000000-", "--00-"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(UploadGone, match=r"k: part 2 of its upload has no valid etag: run again"):
        parse_parts([str(Part(0, 5, 0)), text], "k")


@pytest.mark.parametrize("offset", [0, 4, 6])
def test_parts_with_gaps_or_overlaps(offset: int) -> None:
    with pytest.raises(UploadGone, match=rf"k: part 2 .* starts at byte {offset} instead of 5: run again"):
        parse_parts([str(Part(0, 5, 0)), str(Part(offset, 1, 0))], "k")
