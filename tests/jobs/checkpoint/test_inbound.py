"""Bits that flip on their way in are noticed: of one task's ranges, and of many tasks' together."""

import itertools
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.jobs.checkpoint.inbound import Received, is_proved, joined, merged
from fleetpress.storage.errors import StoreUnreachable
from fleetpress.storage.store import ObjectStore, open_store

BODY = random.Random(1).randbytes(10_000)
HEADER = (16).to_bytes(8, "little") + b"h" * 16


class Flipping:
    """A store that keeps checksums, whose ranges arrive with one bit flipped at a given byte of the object."""

    def __init__(self, store: ObjectStore, at: int | None) -> None:
        self._store = store
        self.at = at

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def stored_crc32(self, key: str, *, etag: str) -> tuple[int, int]:
        data = self._store.get(key, etag=etag)
        return len(data), zlib.crc32(data)

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        self._store.read_into(key, start, buffer, etag=etag)
        if self.at is not None and start <= self.at < start + len(buffer):
            buffer[self.at - start] ^= 4


@pytest.fixture
def etag(tmp_path: Path) -> str:
    return open_store(str(tmp_path)).put("x", HEADER + BODY).etag


def flipping(place: Path, at: int | None) -> ObjectStore:
    return Flipping(open_store(str(place)), at)  # type: ignore[return-value]


def read(received: Received, etag: str, *cuts: int) -> None:
    for start, end in itertools.pairwise(cuts):
        received.read_into("x", start, memoryview(bytearray(end - start)), etag=etag)


def test_a_task_that_reads_all_proves_it(tmp_path: Path, etag: str) -> None:
    received = Received(flipping(tmp_path, None), [("x", etag)])
    read(received, etag, 24, 5000, 5001, 10_024)
    assert received.unproved() == {}


@pytest.mark.parametrize("at", [24, 5000, 10_023])
def test_a_flipped_bit_is_damage(tmp_path: Path, etag: str, at: int) -> None:
    received = Received(flipping(tmp_path, at), [("x", etag)])
    read(received, etag, 24, 5000, 5001, 10_024)
    with pytest.raises(StoreUnreachable, match="damaged on their way"):
        received.unproved()


def test_a_part_of_a_file_proves_nothing_alone_and_all_parts_do(tmp_path: Path, etag: str) -> None:
    store = flipping(tmp_path, None)
    tasks = [Received(store, [("x", etag)]) for _ in range(3)]
    for task, cuts in zip(tasks, [(24, 100, 4000), (9000, 10_024), (4000, 9000)], strict=True):
        read(task, etag, *cuts)
        assert list(task.unproved()) == ["x"]
    together = merged(task.unproved() for task in tasks)["x"]
    kept = store.stored_crc32("x", etag=etag)
    assert is_proved(store, "x", together, kept)
    together[0][2] ^= 1
    with pytest.raises(StoreUnreachable):
        is_proved(store, "x", together, kept)


def test_a_range_that_reads_differently_the_second_time_is_damage(tmp_path: Path, etag: str) -> None:
    store = flipping(tmp_path, None)
    received = Received(store, [("x", etag)])
    read(received, etag, 24, 5000)
    read(received, etag, 24, 5000)
    store.at = 30  # type: ignore[attr-defined]
    with pytest.raises(StoreUnreachable, match="damaged"):
        read(received, etag, 24, 5000)


def test_where_nothing_is_kept_nothing_is_computed(tmp_path: Path, etag: str) -> None:
    received = Received(open_store(str(tmp_path)), [("x", etag)])
    read(received, etag, 24, 10_024)
    assert received.ranges() == {}


@given(st.lists(st.integers(0, len(BODY)), max_size=8), st.randoms())
def test_ranges_in_any_order_become_one(cuts: list[int], order: random.Random) -> None:
    edges = sorted({0, *cuts, len(BODY)})
    ranges = [[start, end - start, zlib.crc32(BODY[start:end])] for start, end in itertools.pairwise(edges)]
    order.shuffle(ranges)
    assert joined(ranges) == [[0, len(BODY), zlib.crc32(BODY)]]
