"""Etags of files are the MD5 of their bytes, hashed once while the file stays as it is."""

import hashlib
import os
import sqlite3
from pathlib import Path

import pytest

from fleetpress.storage import etags
from fleetpress.storage.etags import etag_of_bytes, etag_of_file

_BIG = b"x" * (300 << 10)  # big enough to be remembered on disk
_LATER_NS = 10_000_000_000


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def _new_process() -> None:
    etags._cache.cache_clear()


@pytest.mark.parametrize("size_bytes", [0, 1, 1 << 20, (1 << 20) + 1])
def test_is_the_md5(tmp_path: Path, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    (tmp_path / "f").write_bytes(data)
    assert _etag(tmp_path / "f") == hashlib.md5(data).hexdigest() == etag_of_bytes(data)


def test_young_files_are_hashed_every_time(tmp_path: Path, hashed: list[int]) -> None:
    (tmp_path / "f").write_bytes(_BIG)
    assert _etag(tmp_path / "f") == _etag(tmp_path / "f")
    assert len(hashed) == 2


@pytest.mark.usefixtures("later")
def test_old_files_are_hashed_once(tmp_path: Path, hashed: list[int]) -> None:
    (tmp_path / "f").write_bytes(_BIG)
    first = _etag(tmp_path / "f")
    assert _etag(tmp_path / "f") == first
    assert len(hashed) == 1
    _new_process()
    assert _etag(tmp_path / "f") == first
    assert len(hashed) == 1


@pytest.mark.usefixtures("later")
def test_small_files_cost_no_row(tmp_path: Path, hashed: list[int]) -> None:
    (tmp_path / "f").write_bytes(b"small")
    _etag(tmp_path / "f")
    _etag(tmp_path / "f")
    assert len(hashed) == 1
    _new_process()
    _etag(tmp_path / "f")
    assert len(hashed) == 2


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("big", [True, False])
def test_same_size_and_mtime_but_other_bytes(tmp_path: Path, big: bool) -> None:
    size = len(_BIG) if big else 5
    path = tmp_path / "f"
    path.write_bytes(b"a" * size)
    os.utime(path, ns=(10**18, 10**18))
    first = _etag(path)
    with path.open("r+b") as file:  # in place: the inode stays as well
        file.write(b"b" * size)
    os.utime(path, ns=(10**18, 10**18))
    assert _etag(path) == etag_of_bytes(b"b" * size) != first


@pytest.mark.usefixtures("later")
def test_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(_BIG)
    _etag(path)
    (tmp_path / "new").write_bytes(_BIG[:-1] + b"y")
    os.replace(tmp_path / "new", path)
    assert _etag(path) == etag_of_bytes(_BIG[:-1] + b"y")


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", ["a file is in the way", "not a database", "another table"])
def test_works_without_the_cache(tmp_path: Path, cache_home: Path, hashed: list[int], damage: str) -> None:
    if damage == "a file is in the way":
        cache_home.write_bytes(b"")
    elif damage == "not a database":
        (cache_home / "fleetpress").mkdir(parents=True)
        (cache_home / "fleetpress" / "etags.sqlite").write_bytes(b"junk" * 1000)
    else:
        (cache_home / "fleetpress").mkdir(parents=True)
        database = sqlite3.connect(cache_home / "fleetpress" / "etags.sqlite")
        database.execute("CREATE TABLE etags (path TEXT)")  # of another version: every statement fails
        database.close()
    path = tmp_path / "f"
    path.write_bytes(_BIG)
    assert _etag(path) == _etag(path) == etag_of_bytes(_BIG)
    assert len(hashed) == 1
