"""Parts of an upload: the same whatever the writes, two on their way at a time, and no buffer lost whatever fails."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
from fleetpress_test_watched import (  # by this name conftest.py loads watched.py
    SECONDS,
    AtOnce,
    Watched,
    within,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.storage.streams import PARTS_IN_FLIGHT, PartWriter, Stages


class Sent:
    """A store that takes parts: what it got, by number."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[int, bytes]] = {}
        self.sending = AtOnce()

    def __call__(self, number: int, offset: int, data: memoryview) -> str:
        with self.sending:
            self.parts[number] = offset, bytes(data)
            return f"etag-{number}"


@st.composite
def chunked(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of parts, and where the stream is cut into writes."""
    sizes = draw(st.lists(st.integers(1, 3000), max_size=12))
    cuts = draw(st.lists(st.integers(0, sum(sizes)), max_size=20))
    return sizes, sorted(cuts)


@settings(max_examples=80, deadline=None)
@given(chunked(), st.integers(1, 5000), st.integers(0, 10**10))
def test_parts_do_not_depend_on_the_writes(cut: tuple[list[int], list[int]], first: int, offset: int) -> None:
    sizes, cuts = cut
    data = random.Random(sum(sizes)).randbytes(sum(sizes))
    sent, buffers, stages = Sent(), Watched(), Stages()

    def write_all() -> list[str]:
        scratch = bytearray(len(data))
        with PartWriter(
            sent, sizes, stages, buffers=buffers, first_number=first, offset_bytes=offset
        ) as writer:
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                scratch[: end - start] = data[start:end]
                writer.write(memoryview(scratch)[: end - start])
                scratch[: end - start] = bytes(end - start)  # what was written is the writer's own
            return writer.finish()

    etags = within(write_all)
    starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
    assert sent.parts == {
        first + index: (offset + start, data[start : start + size])
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }
    assert etags == [f"etag-{first + index}" for index in range(len(sizes))]
    assert sent.sending.most <= 2
    assert buffers.most_views <= PARTS_IN_FLIGHT
    assert buffers.views == 0
    assert stages.write.bytes == len(data)


def test_a_writer_waits_while_two_parts_are_on_their_way() -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
    sending, buffers, stages = AtOnce(), Watched(), Stages()

    def send(number: int, offset: int, data: memoryview) -> str:
        with sending:
            begun.release()
            assert go_on.acquire(timeout=SECONDS)
        return str(number)

    with PartWriter(send, [100] * 6, stages, buffers=buffers) as writer, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(writer.write, memoryview(bytes(600)))
        assert begun.acquire(timeout=SECONDS)
        assert begun.acquire(timeout=SECONDS)
        time.sleep(0.05)
        assert not writing.done()
        assert sending.now == 2
        go_on.release(6)
        writing.result(timeout=SECONDS)
        assert writer.finish() == ["1", "2", "3", "4", "5", "6"]
    assert (sending.most, buffers.peak, buffers.now) == (2, 300, 0)
    assert stages.wait.seconds > 0


def test_etags_are_told_in_the_order_of_the_parts() -> None:
    second = threading.Event()

    def send(number: int, offset: int, data: memoryview) -> str:
        if number == 1:
            assert second.wait(SECONDS)
        elif number == 2:
            second.set()
        return str(number)

    def write_all() -> list[str]:
        with PartWriter(send, [5] * 5, Stages(), buffers=Watched()) as writer:
            writer.write(memoryview(bytes(25)))
            return writer.finish()

    assert within(write_all) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("failing", [1, 4, 6])
def test_an_error_of_a_send_reaches_the_writer(failing: int) -> None:
    buffers, sent = Watched(), []

    def send(number: int, offset: int, data: memoryview) -> str:
        if number >= failing:
            raise OSError(f"part {number} was refused")
        sent.append(number)
        return ""

    def write_all() -> None:
        with PartWriter(send, [50] * 6, Stages(), buffers=buffers) as writer:
            for _ in range(30):
                writer.write(memoryview(bytes(10)))
            writer.finish()

    with pytest.raises(OSError, match=f"part {failing} was refused"):
        within(write_all)
    assert sorted(sent) == list(range(1, failing))
    assert buffers.views == 0


def test_an_error_beside_the_writer_waits_for_what_is_on_its_way() -> None:
    buffers, done = Watched(), []

    def send(number: int, offset: int, data: memoryview) -> str:
        time.sleep(0.03)
        done.append(number)
        raise OSError("not the first error")

    def write_all() -> None:
        with PartWriter(send, [10] * 5, Stages(), buffers=buffers) as writer:
            writer.write(memoryview(bytes(25)))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        within(write_all)
    assert sorted(done) == [1, 2]
    assert buffers.views == 0


def test_a_part_that_no_thread_has_taken_up_gives_its_buffer_back() -> None:
    buffers, go_on = Watched(), threading.Event()

    def write_all() -> None:
        with PartWriter(lambda *_: "", [10] * 5, Stages(), buffers=buffers) as writer:
            for _ in range(2):  # as many as the writer has threads
                writer._pool.submit(go_on.wait, SECONDS)
            writer.write(memoryview(bytes(10)))
            threading.Timer(0.05, go_on.set).start()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        within(write_all)
    assert buffers.views == 0


@pytest.mark.parametrize(
    ("written", "words"), [(15, "5 bytes of an unfinished part"), (10, "1 parts were never")]
)
def test_what_was_not_written_is_not_finished(written: int, words: str) -> None:
    buffers = Watched()

    def write_some() -> None:
        with PartWriter(lambda *_: "", [10, 10], Stages(), buffers=buffers) as writer:
            writer.write(memoryview(bytes(written)))
            writer.finish()

    with pytest.raises(AssertionError, match=words):
        within(write_some)
    assert buffers.views == 0
