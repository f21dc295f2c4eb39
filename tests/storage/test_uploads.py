"""Objects written in parts by many hands, and ranges read into memory that is there: in every kind of store."""

import json
import random
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleetpress.storage.errors import NotWritable, StoreUnreachable, UploadGone
from fleetpress.storage.store import MIN_PART_BYTES, ObjectStore, open_store

_RANDOM = random.Random(3)
_PARTS = [_RANDOM.randbytes(size) for size in (MIN_PART_BYTES, MIN_PART_BYTES + 1, 3)]
_WHOLE = b"".join(_PARTS)
_BIG_BYTES = 64 << 20


@pytest.fixture(params=["folder", "seaweedfs"])
def real_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Without moto, which answers 500 where S3 says NoSuchUpload, and keeps its objects in this process."""
    fixture = {"folder": "tmp_path", "seaweedfs": "seaweed_uri"}[request.param]
    return open_store(str(request.getfixturevalue(fixture)))


def _offsets(parts: Sequence[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of every part."""
    offset = 0
    for number, part in enumerate(parts, 1):
        yield number, offset, part
        offset += len(part)


def _upload(store: ObjectStore, upload_id: str, parts: Sequence[bytes] = _PARTS) -> list[str]:
    return [
        store.upload_part("a/k", upload_id, number=number, offset=offset, data=part)
        for number, offset, part in _offsets(parts)
    ]


def test_an_object_in_parts(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    assert any_store.upload_exists("a/k", upload_id)
    etags = _upload(any_store, upload_id)
    assert any_store.list() == []
    assert json.loads(json.dumps(etags)) == etags
    assert all(etag.isascii() and etag.isprintable() and len(etag) < 100 for etag in etags)
    info = any_store.complete_upload("a/k", upload_id, etags)
    assert info == any_store.head("a/k")
    assert any_store.list() == [info]
    assert info.size_bytes == len(_WHOLE)
    assert any_store.get("a/k") == _WHOLE
    assert (
        any_store.get_range("a/k", MIN_PART_BYTES - 2, 4, etag=info.etag)
        == (_WHOLE[MIN_PART_BYTES - 2 : MIN_PART_BYTES + 2])
    )
    assert not any_store.upload_exists("a/k", upload_id)


def test_one_small_part(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    info = any_store.complete_upload("a/k", upload_id, _upload(any_store, upload_id, [b"all"]))
    assert info == any_store.head("a/k")
    assert any_store.get("a/k") == b"all"


def test_replaces_what_was_there_when_it_is_complete(any_store: ObjectStore) -> None:
    old = any_store.put("a/k", b"old")
    upload_id = any_store.create_upload("a/k")
    etags = _upload(any_store, upload_id)
    assert any_store.head("a/k") == old
    assert any_store.complete_upload("a/k", upload_id, etags).etag != old.etag
    assert any_store.get("a/k") == _WHOLE


def test_parts_in_any_order_from_two_threads(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    etags: dict[int, str] = {}
    both = threading.Barrier(2)

    def send(parts: Sequence[tuple[int, int, bytes]]) -> None:
        both.wait()
        for number, offset, part in parts:
            etags[number] = any_store.upload_part(
                "a/k", upload_id, number=number, offset=offset, data=memoryview(part)
            )

    backwards = list(_offsets([*_PARTS[:2], *_PARTS]))[::-1]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send, (backwards[::2], backwards[1::2])))
    any_store.complete_upload("a/k", upload_id, [etags[number] for number in sorted(etags)])
    assert any_store.get("a/k") == b"".join(_PARTS[:2]) + _WHOLE


def test_views_of_any_shape(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    data = memoryview(bytearray(_PARTS[0]))
    views = [data.cast("B", (5, MIN_PART_BYTES // 5)), data.cast("H")]
    etags = [
        any_store.upload_part("a/k", upload_id, number=index + 1, offset=index * MIN_PART_BYTES, data=view)
        for index, view in enumerate(views)
    ]
    any_store.complete_upload("a/k", upload_id, etags)
    assert any_store.get("a/k") == _PARTS[0] * 2


def test_the_same_part_again_replaces_it(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    etags = _upload(any_store, upload_id, [_PARTS[1], b"first"])
    again = any_store.upload_part("a/k", upload_id, number=2, offset=len(_PARTS[1]), data=b"again")
    any_store.complete_upload("a/k", upload_id, [etags[0], again])
    assert any_store.get("a/k") == _PARTS[1] + b"again"


def test_the_upload_goes_on_without_its_maker(place: str) -> None:
    upload_id = type(open_store(place))(place).create_upload("a/k")
    etags = [
        type(open_store(place))(place).upload_part("a/k", upload_id, number=n, offset=offset, data=part)
        for n, offset, part in _offsets(_PARTS)
    ]
    type(open_store(place))(place).complete_upload("a/k", upload_id, etags)
    assert open_store(place).get("a/k") == _WHOLE


def test_completed_twice(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    etags = _upload(any_store, upload_id)
    info = any_store.complete_upload("a/k", upload_id, etags)
    assert any_store.complete_upload("a/k", upload_id, etags) == info
    assert any_store.get("a/k") == _WHOLE


def test_abort(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    _upload(any_store, upload_id, _PARTS[:1])
    any_store.abort_upload("a/k", upload_id)
    any_store.abort_upload("a/k", upload_id)
    assert not any_store.upload_exists("a/k", upload_id)
    assert any_store.list() == []
    any_store.put("a/k", b"mine")
    any_store.abort_upload("a/k", upload_id)
    assert any_store.get("a/k") == b"mine"


def test_gone(real_store: ObjectStore) -> None:
    upload_id = real_store.create_upload("a/k")
    etags = _upload(real_store, upload_id, _PARTS[:1])
    real_store.abort_upload("a/k", upload_id)
    with pytest.raises(UploadGone, match=r"a/k.*run again"):
        _upload(real_store, upload_id)
    with pytest.raises(UploadGone, match=r"a/k.*run again"):
        real_store.complete_upload("a/k", upload_id, etags)
    real_store.put("a/k", _PARTS[1])
    with pytest.raises(UploadGone, match=r"a/k.*run again"):
        real_store.complete_upload("a/k", upload_id, etags)
    assert real_store.get("a/k") == _PARTS[1]


@pytest.mark.parametrize("upload_id", ["nonsense", "0" * 40])
def test_an_id_that_was_never_given(real_store: ObjectStore, upload_id: str) -> None:
    assert not real_store.upload_exists("a/k", upload_id)
    real_store.abort_upload("a/k", upload_id)
    with pytest.raises(UploadGone, match=r"a/k.*run again"):
        _upload(real_store, upload_id, [b"x"])


def test_an_upload_belongs_to_its_key(real_store: ObjectStore) -> None:
    upload_id = real_store.create_upload("a/k")
    assert not real_store.upload_exists("a/other", upload_id)
    with pytest.raises(UploadGone, match="a/other"):
        real_store.upload_part("a/other", upload_id, number=1, offset=0, data=b"x")
    real_store.abort_upload("a/other", upload_id)
    assert real_store.upload_exists("a/k", upload_id)


def test_parts_that_are_not_the_recorded_ones(any_store: ObjectStore) -> None:
    upload_id = any_store.create_upload("a/k")
    etags = _upload(any_store, upload_id)
    other = any_store.create_upload("a/k")
    others = _upload(any_store, other, [*_PARTS[:2], b"xyz", b"more"])
    for wrong, text in (
        (etags[::-1], "part 1 of its upload starts at byte"),
        (etags[1:], "part 1 of its upload starts at byte"),
        ([*etags[:2], "nonsense"], "part 3 of its upload has no valid etag"),
        ([*etags[:2], ""], "part 3 of its upload has no valid etag"),
        (others, "run again"),
    ):
        with pytest.raises(UploadGone, match=text):
            any_store.complete_upload("a/k", upload_id, wrong)
    assert any_store.list() == []
    any_store.complete_upload("a/k", upload_id, etags)
    assert any_store.get("a/k") == _WHOLE


@pytest.mark.parametrize("server", ["s3_uri", "seaweed_uri"])
def test_too_small_a_part(server: str, request: pytest.FixtureRequest) -> None:
    store = open_store(request.getfixturevalue(server))
    upload_id = store.create_upload("a/k")
    with pytest.raises(NotWritable, match=r"a/k .*smaller than .*5 MiB"):
        store.complete_upload("a/k", upload_id, _upload(store, upload_id, [b"small", b"last"]))


def test_the_server_compares_the_checksum(seaweed_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(seaweed_uri)
    upload_id = store.create_upload("a/k")
    monkeypatch.setattr("fleetpress.storage.s3._checksum", lambda _: "AAAAAA==")
    with pytest.raises(StoreUnreachable, match=r"a/k .*damaged on their way"):
        _upload(store, upload_id, [b"bytes"])
    with pytest.raises(StoreUnreachable, match=r"a/k .*damaged on their way"):
        store.put("a/k", b"bytes")


def test_no_memory_but_the_callers(real_store: ObjectStore) -> None:
    buffer = memoryview(bytearray(_RANDOM.randbytes(_BIG_BYTES)))
    upload_id = real_store.create_upload("a/k")

    def peak_bytes() -> int:
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        etag = real_store.upload_part("a/k", upload_id, number=1, offset=0, data=buffer)
        assert peak_bytes() < 4 << 20
        info = real_store.complete_upload("a/k", upload_id, [etag])
        expected = bytes(buffer[:1000])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        real_store.read_into("a/k", 0, buffer, etag=info.etag)
        assert peak_bytes() - before < 4 << 20
    finally:
        tracemalloc.stop()
    assert bytes(buffer[:1000]) == expected


def test_what_was_begun_and_not_ended_is_listed_and_discarded(real_store: ObjectStore) -> None:
    assert list(real_store.list_unfinished()) == []
    begun = {key: real_store.create_upload(key) for key in ("a/k", "b")}
    real_store.upload_part("a/k", begun["a/k"], number=1, offset=0, data=_PARTS[0])
    found = list(real_store.list_unfinished())
    assert {item.upload for item in found} == set(begun.values())
    for item in (*found, found[0]):  # one that is gone is no error
        real_store.discard(item)
    assert list(real_store.list_unfinished()) == []
    assert not any(real_store.upload_exists(key, upload) for key, upload in begun.items())
