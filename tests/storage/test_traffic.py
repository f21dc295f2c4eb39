"""Bytes that a piece of work moves, as the stores count them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore
from fleetpress.storage.traffic import carried, counted, note_read

PART = b"x" * (5 << 20)


def test_what_the_stores_move_is_counted(store: ObjectStore) -> None:
    with counted() as traffic:
        store.put("a", b"12345")
        assert store.put_if_absent("b", b"123")
        assert store.put_if_absent("b", b"other") is not True  # it reads what is there
        upload = store.create_upload("c")
        etags = [
            store.upload_part("c", upload, number=1, offset=0, data=PART),
            store.upload_part("c", upload, number=2, offset=len(PART), data=b"end"),
        ]
        store.complete_upload("c", upload, etags)
    assert traffic.bytes_written == 5 + 3 + len(PART) + 3
    assert traffic.bytes_read == 3
    with counted() as traffic:
        store.get("a")
        store.get_range("c", 10, 100)
        store.read_into("c", 0, memoryview(bytearray(7)))
        store.head("c")
        store.list()
        with pytest.raises(ObjectNotFound):
            store.get("d")
    assert (traffic.bytes_read, traffic.bytes_written) == (5 + 100 + 7, 0)


def test_threads_count_for_who_began_them_and_no_other() -> None:
    with ThreadPoolExecutor(1) as pool, counted() as outer:
        pool.submit(note_read, 100).result()
        with counted() as inner:
            pool.submit(carried(note_read), 10).result()
        pool.submit(carried(note_read), 1).result()
    note_read(1000)
    assert (inner.bytes_read, outer.bytes_read) == (10, 1)
