"""Reads that run ahead: order, bytes, bounded memory, and an end whatever fails; what stages count; sizes of parts."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from fleetpress_test_watched import (  # by this name conftest.py loads watched.py
    SECONDS,
    AtOnce,
    Watched,
    within,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.storage import streams
from fleetpress.storage.streams import Stage, Stages, part_sizes, read_ahead


@dataclass(frozen=True)
class Range:
    """A request."""

    offset: int
    bytes: int


def ranges(sizes: list[int]) -> Iterator[Range]:
    offset = 0
    for size in sizes:
        yield Range(offset, size)
        offset += size


def data_of(size_bytes: int) -> bytes:
    return bytes(range(251)) * (size_bytes // 251 + 1)


def reader(data: bytes) -> Callable[[Range, memoryview], None]:
    def read(request: Range, view: memoryview) -> None:
        view[:] = data[request.offset : request.offset + request.bytes]

    return read


# ---- reading


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=40), st.integers(0, 12_000))
def test_bytes_come_in_order_and_in_bounded_memory(sizes: list[int], ahead: int) -> None:
    buffers, stages, data = Watched(), Stages(), data_of(sum(sizes))

    def read_all() -> list[tuple[Range, bytes]]:
        found = read_ahead(ranges(sizes), reader(data), stages, buffers=buffers, ahead_bytes=ahead)
        return [(request, bytes(view)) for request, view in found]

    found = within(read_all)
    assert [request for request, _ in found] == list(ranges(sizes))
    assert b"".join(part for _, part in found) == data[: sum(sizes)]
    assert buffers.peak <= max(ahead, *sizes, 0)
    assert buffers.most_views <= 16
    assert (buffers.now, buffers.views) == (0, 0)
    assert stages.read.bytes == sum(sizes)


def test_a_view_is_valid_until_the_next_one() -> None:
    """Reads that run ahead do not write into the bytes that are being used."""
    buffers, data = Watched(), data_of(100_000)

    def read_all() -> None:
        for request, view in read_ahead(
            ranges([1000] * 100), reader(data), Stages(), buffers=buffers, ahead_bytes=4000
        ):
            time.sleep(0.0005)
            assert view == data[request.offset : request.offset + request.bytes]

    within(read_all)


def test_four_reads_at_a_time() -> None:
    together = threading.Barrier(4, timeout=SECONDS)
    reading = AtOnce()

    def read(request: Range, view: memoryview) -> None:
        with reading:
            together.wait()

    within(
        lambda: list(read_ahead(ranges([10] * 12), read, Stages(), buffers=Watched(), ahead_bytes=10 * 16))
    )
    assert reading.most == 4


def test_one_at_a_time_if_there_is_no_room_for_two() -> None:
    reading, buffers = AtOnce(), Watched()

    def read(request: Range, view: memoryview) -> None:
        with reading:
            time.sleep(0.001)

    within(lambda: list(read_ahead(ranges([10] * 9), read, Stages(), buffers=buffers, ahead_bytes=19)))
    assert (reading.most, buffers.most_views) == (1, 1)


def test_small_requests_do_not_pile_up_buffers() -> None:
    """A buffer has a megabyte at least, whatever it is taken for."""
    buffers = Watched()
    found = read_ahead(
        ranges([1, 0] * 50), reader(data_of(50)), Stages(), buffers=buffers, ahead_bytes=1 << 20
    )
    assert len(within(lambda: list(found))) == 100
    assert buffers.most_views == 16


def test_buffers_are_used_again() -> None:
    buffers = Watched()
    within(
        lambda: list(
            read_ahead(ranges([100] * 50), reader(data_of(5000)), Stages(), buffers=buffers, ahead_bytes=300)
        )
    )
    assert buffers.most_views == 3
    assert len(buffers._free) == 3


@pytest.mark.parametrize("failing", [0, 3, 9])
def test_an_error_of_a_read_comes_in_its_turn(failing: int) -> None:
    buffers, data, seen = Watched(), data_of(1000), []

    def read(request: Range, view: memoryview) -> None:
        if request.offset == failing * 100:
            raise OSError("the line is cut")
        reader(data)(request, view)

    def read_all() -> None:
        for request, _ in read_ahead(ranges([100] * 10), read, Stages(), buffers=buffers, ahead_bytes=500):
            seen.append(request.offset // 100)

    with pytest.raises(OSError, match="the line is cut"):
        within(read_all)
    assert seen == list(range(failing))
    assert buffers.views == 0


def test_no_read_begins_after_an_error() -> None:
    begun, failed = [], threading.Event()

    def read(request: Range, view: memoryview) -> None:
        begun.append(request.offset)
        if request.offset == 0:
            failed.set()
            raise OSError("no")
        assert failed.wait(SECONDS)
        time.sleep(0.15)

    buffers = Watched()
    with pytest.raises(OSError, match="no"):
        within(lambda: list(read_ahead(ranges([1] * 16), read, Stages(), buffers=buffers, ahead_bytes=16)))
    assert len(begun) <= 8, "the first four, and what their threads took up before the error was seen"
    assert buffers.views == 0


def test_a_consumer_may_stop_early() -> None:
    """Reads under way still write into their buffers: those come back only after that."""
    buffers, go_on, begun = Watched(), threading.Event(), threading.Semaphore(0)
    late = []

    def read(request: Range, view: memoryview) -> None:
        if request.offset:
            begun.release()
            assert go_on.wait(SECONDS)
            late.append(buffers.views)
            view[:] = b"x" * len(view)

    found = read_ahead(ranges([10] * 8), read, Stages(), buffers=buffers, ahead_bytes=40)
    request, _ = next(found)
    assert request.offset == 0
    for _ in range(3):
        assert begun.acquire(timeout=SECONDS)
    assert buffers.views == 4
    threading.Timer(0.05, go_on.set).start()
    within(found.close)
    assert late == [4, 4, 4]
    assert buffers.views == 0


def test_an_error_of_the_consumer_or_of_the_requests() -> None:
    buffers = Watched()

    def cut_short() -> Iterator[Range]:
        yield from ranges([10, 10, 10])
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        within(
            lambda: list(
                read_ahead(cut_short(), reader(data_of(30)), Stages(), buffers=buffers, ahead_bytes=20)
            )
        )
    assert buffers.views == 0

    def consume() -> None:
        for _ in read_ahead(ranges([10] * 9), reader(data_of(90)), Stages(), buffers=buffers, ahead_bytes=30):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        within(consume)
    assert buffers.views == 0


# ---- stages


def test_stages_count_bytes_and_seconds() -> None:
    stages = Stages()
    assert stages.compute.timed(7, lambda: time.sleep(0.01) or "done") == "done"
    assert stages.compute.timed(5, lambda: "again") == "again"
    told = stages.as_dict()
    assert told.keys() == {"read", "compute", "write", "wait"}
    assert told["compute"]["bytes"] == 12
    assert told["compute"]["seconds"] >= 0.01 > told["compute"]["cpu_seconds"]
    assert told["wait"] == {"bytes": 0, "seconds": 0.0, "cpu_seconds": 0.0}


def test_no_count_of_a_thread_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that let other threads run, and go on by one second a look."""
    looks = threading.local()

    def clock() -> float:
        time.sleep(0.0001)
        looks.count = getattr(looks, "count", 0) + 1
        return float(looks.count)

    monkeypatch.setattr(streams, "time", SimpleNamespace(perf_counter=clock, thread_time=clock))
    stage = Stage()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: stage.timed(1, lambda: None), range(400)))
    assert stage.bytes == 400
    assert stage.seconds + stage.cpu_seconds == 400 * (2 + 2)


# ---- parts


@given(st.integers(0, 10**12), st.integers(1, 10**9))
def test_parts_are_about_equal(size: int, part: int) -> None:
    if size // part > 10_000:
        part = size // 10_000 + 1
    sizes = part_sizes(size, part)
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1
    if size < 2 * part:
        assert sizes == [size]
    else:
        assert part <= min(sizes) <= max(sizes) < 2 * part
