"""What every store does: the same suite over a folder, moto and SeaweedFS."""

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetpress.storage.errors import InvalidUri, ObjectNotFound, SourceChanged, TooLarge
from fleetpress.storage.store import ObjectStore, StoreProbe, open_store, read_json, text_field
from fleetpress.storage.uri import join


def _md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def test_put_and_get(any_store: ObjectStore) -> None:
    data = bytes(range(256)) * 5000
    info = any_store.put("a/b/c.bin", data)
    assert any_store.get("a/b/c.bin") == data
    assert (info.key, info.size_bytes, info.etag) == ("a/b/c.bin", len(data), _md5(data))
    assert any_store.head("a/b/c.bin") == info
    assert any_store.list() == [info]


def test_empty_object(any_store: ObjectStore) -> None:
    info = any_store.put("empty", b"")
    assert any_store.get("empty") == b""
    assert any_store.get_range("empty", 0, 0, etag=info.etag) == b""
    assert any_store.head("empty").size_bytes == 0


def test_replace_changes_the_etag(any_store: ObjectStore) -> None:
    first = any_store.put("k", b"first")
    second = any_store.put("k", b"other")
    assert any_store.get("k") == b"other"
    assert first.etag != second.etag == any_store.head("k").etag


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 10), (9, 1), (3, 4), (10, 0), (0, 0)])
def test_range(any_store: ObjectStore, start: int, length: int) -> None:
    info = any_store.put("k", b"0123456789")
    expected = b"0123456789"[start : start + length]
    assert any_store.get_range("k", start, length) == expected
    assert any_store.get_range("k", start, length, etag=info.etag) == expected
    buffer = bytearray(b"." * 12)
    any_store.read_into("k", start, memoryview(buffer)[1 : 1 + length], etag=info.etag)
    assert buffer == b"." + expected + b"." * (11 - length)


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (500, 1)])
def test_range_past_the_end(any_store: ObjectStore, start: int, length: int) -> None:
    any_store.put("k", b"0123456789")
    with pytest.raises(SourceChanged, match="root/k"):
        any_store.get_range("k", start, length)
    with pytest.raises(SourceChanged, match="root/k"):
        any_store.read_into("k", start, memoryview(bytearray(length)))


@pytest.mark.parametrize("length", [0, 3])
def test_range_of_another_version(any_store: ObjectStore, length: int) -> None:
    old = any_store.put("k", b"0123456789")
    any_store.put("k", b"9876543210")
    with pytest.raises(SourceChanged, match="changed"):
        any_store.get_range("k", 0, length, etag=old.etag)
    with pytest.raises(SourceChanged, match="changed"):
        any_store.read_into("k", 0, memoryview(bytearray(length)), etag=old.etag)


@pytest.mark.parametrize("size_bytes", [(8 << 20) - 1, 8 << 20, (8 << 20) + 1])
def test_large_object(any_store: ObjectStore, size_bytes: int) -> None:
    """Around the size where the etag of a file is no longer its MD5."""
    data = random.Random(size_bytes).randbytes(size_bytes)
    info = any_store.put("k", data)
    assert info == any_store.head("k") == any_store.list()[0]
    buffer = memoryview(bytearray(size_bytes - 7)).cast("B", (1, size_bytes - 7))
    any_store.read_into("k", 3, buffer, etag=info.etag)
    assert buffer.tobytes() == data[3:-4]
    assert any_store.get("k") == data
    other = any_store.put("k", data[:-1])
    assert other.etag != info.etag
    with pytest.raises(SourceChanged):
        any_store.read_into("k", 3, buffer, etag=info.etag)


def test_missing(any_store: ObjectStore) -> None:
    any_store.put("there/x", b"1")
    for key in ("missing", "there", "there/x2", "there/y/z"):
        with pytest.raises(ObjectNotFound, match=f"root/{key}"):
            any_store.get(key)
        with pytest.raises(ObjectNotFound, match=f"root/{key}"):
            any_store.head(key)
        for length in (0, 1):
            with pytest.raises(ObjectNotFound, match=f"root/{key}"):
                any_store.read_into(key, 0, memoryview(bytearray(length)))
            with pytest.raises(ObjectNotFound, match=f"root/{key}"):
                any_store.get_range(key, 0, length)


def test_list(any_store: ObjectStore) -> None:
    keys = ["a", "a-b", "a.c/x", "a0", "b/1", "b/2/3", "b2", "ä", "z z/ü"]
    for key in keys:
        any_store.put(key, key.encode())
    listed = any_store.list()
    assert [info.key for info in listed] == sorted(keys, key=str.encode)
    assert [info.etag for info in listed] == [_md5(info.key.encode()) for info in listed]
    for prefix in ("a", "b", "b/", "b/2", "b/2/", "z", "none", "b/none/", "../", "/", "b//"):
        expected = [info for info in listed if info.key.startswith(prefix)]
        assert any_store.list(prefix) == expected, prefix


def test_list_sees_only_its_root(place: str) -> None:
    open_store(join(place, "root")).put("x", b"1")
    open_store(join(place, "root-2")).put("y", b"2")
    assert [info.key for info in open_store(join(place, "root")).list()] == ["x"]
    assert [info.key for info in open_store(place).list()] == ["root-2/y", "root/x"]


def test_empty_list(any_store: ObjectStore) -> None:
    assert any_store.list() == []
    assert any_store.list("models/") == []


def test_put_if_absent(any_store: ObjectStore) -> None:
    assert any_store.put_if_absent("claims/task", b"mine")
    assert not any_store.put_if_absent("claims/task", b"theirs")
    assert any_store.put_if_absent("claims/task", b"mine")  # a repeated write of ours is still ours
    assert any_store.get("claims/task") == b"mine"


def test_one_winner(any_store: ObjectStore) -> None:
    start = threading.Barrier(6)

    def claim(token: bytes) -> bool:
        start.wait()
        return any_store.put_if_absent("claim", token)

    tokens = [f"owner {number}".encode() for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(claim, tokens))
    assert won.count(True) == 1
    assert any_store.get("claim") == tokens[won.index(True)]


def test_delete(any_store: ObjectStore) -> None:
    any_store.put("a/b", b"1")
    any_store.delete("a/b")
    any_store.delete("a/b")
    any_store.delete("never/there")
    with pytest.raises(ObjectNotFound):
        any_store.head("a/b")
    any_store.put("a/c", b"2")
    any_store.delete("a")
    assert [info.key for info in any_store.list()] == ["a/c"]


def test_bad_keys(any_store: ObjectStore) -> None:
    for key in ("../x", "/x", "", "a//b"):
        for action in (any_store.get, any_store.head, any_store.delete):
            with pytest.raises(InvalidUri):
                action(key)
        with pytest.raises(InvalidUri):
            any_store.put(key, b"")
        with pytest.raises(InvalidUri):
            any_store.put_if_absent(key, b"")
        with pytest.raises(InvalidUri):
            any_store.get_range(key, 0, 0)
        with pytest.raises(InvalidUri):
            any_store.read_into(key, 0, memoryview(bytearray(1)))
        with pytest.raises(InvalidUri):
            any_store.create_upload(key)


def test_probe(any_store: ObjectStore) -> None:
    assert any_store.probe() == StoreProbe(reachable=True, writable=True, conditional_writes=True)
    assert any_store.list() == []


def test_readers_never_see_a_part(any_store: ObjectStore) -> None:
    versions = [bytes([number]) * 300_000 for number in (1, 2)]
    any_store.put("k", versions[0])
    done = threading.Event()

    def write() -> None:
        for number in range(10):
            any_store.put("k", versions[number % 2])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.is_set():
            assert any_store.get("k") in versions
        writing.result()
    assert [info.key for info in any_store.list()] == ["k"]


_names = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\\x7f"), min_size=1, max_size=12
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=_names.filter(lambda name: name not in (".", "..")), data=st.binary(max_size=200))
def test_any_name_and_bytes(store: ObjectStore, name: str, data: bytes) -> None:
    store.put(f"odd/{name}", data)
    assert store.get(f"odd/{name}") == data
    assert [info.key for info in store.list(f"odd/{name}")][:1] == [f"odd/{name}"]
    store.delete(f"odd/{name}")


def test_one_store_per_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("x") is open_store(f"file://{tmp_path}/x/") is open_store(str(tmp_path / "x"))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert open_store("x").uri == str(tmp_path / "sub" / "x")
    assert open_store("s3://bucket/a/") is open_store("s3://bucket/a")


def test_a_whole_object_can_be_pinned(any_store: ObjectStore) -> None:
    first = any_store.put("k", b"first")
    assert any_store.get("k", etag=first.etag) == b"first"
    any_store.put("k", b"second")
    with pytest.raises(SourceChanged, match="changed"):
        any_store.get("k", etag=first.etag)
    with pytest.raises(SourceChanged, match="changed"):
        any_store.stored_crc32("k", etag=first.etag)


def test_sizes_are_those_of_the_list(any_store: ObjectStore) -> None:
    for key in ("a/x", "a-b", "c"):
        any_store.put(key, key.encode())
    for prefix in ("", "a", "a/", "nothing"):
        expected = {info.key: info.size_bytes for info in any_store.list(prefix)}
        assert list(any_store.sizes(prefix).items()) == list(expected.items())


def test_an_object_that_is_too_large_is_not_read(any_store: ObjectStore) -> None:
    any_store.put("a", b"12345678")
    assert any_store.get("a", most_bytes=8) == b"12345678"
    with pytest.raises(TooLarge, match="/a has 8 bytes, more than 7"):
        any_store.get("a", most_bytes=7)
    assert any_store.get("a") == b"12345678"


def test_json_of_gigabytes_is_no_json(tmp_path: Path) -> None:
    """A file of holes: it would fill the memory, and takes no room on the disk."""
    with (tmp_path / "record.json").open("wb") as file:
        file.truncate(1 << 36)
    store = open_store(str(tmp_path))
    with pytest.raises(ValueError, match="has 68719476736 bytes, more than 134217728"):
        read_json(store, "record.json")
    assert text_field(store, "record.json", "run") is None
