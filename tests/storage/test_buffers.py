"""Lent buffers are of the asked size and nobody else's; what is given back is used again, within a limit."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.storage.buffers import Buffers

MIB = 1 << 20


def lent_bytes(buffers: Buffers) -> int:
    """Memory that is in use."""
    return sum(block.nbytes for block in buffers._lent.values())


def free_bytes(buffers: Buffers) -> int:
    """Memory that is kept for the next taker."""
    return sum(block.nbytes for block in buffers._free)


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, MIB - 1, MIB, MIB + 1, 5 * MIB + 3])
def test_views_have_the_size_that_was_asked_for(size_bytes: int) -> None:
    buffers = Buffers(8 * MIB)
    view = buffers.take(size_bytes)
    assert (len(view), view.format, view.readonly, view.contiguous) == (size_bytes, "B", False, True)
    view[:] = bytes(size_bytes)
    assert size_bytes <= lent_bytes(buffers) <= size_bytes + MIB
    buffers.give_back(view)


def test_memory_is_used_again() -> None:
    buffers = Buffers(8 * MIB)
    view = buffers.take(3 * MIB)
    view[:3] = b"abc"
    buffers.give_back(view)
    assert bytes(buffers.take(2 * MIB)[:3]) == b"abc"


def test_the_smallest_block_that_fits_is_taken() -> None:
    buffers = Buffers(64 * MIB)
    views = [buffers.take(size * MIB) for size in (9, 3, 5)]
    for mark, view in zip(b"abc", views, strict=True):
        view[0] = mark
        buffers.give_back(view)
    assert [buffers.take(2 * MIB)[0], buffers.take(4 * MIB)[0], buffers.take(2 * MIB)[0]] == list(b"bca")


def test_no_more_is_kept_than_allowed() -> None:
    buffers = Buffers(8 * MIB)
    views = [buffers.take(3 * MIB) for _ in range(5)]
    for view in views:
        buffers.give_back(view)
    assert free_bytes(buffers) == 6 * MIB
    large = buffers.take(9 * MIB)
    assert free_bytes(buffers) == 0, "blocks that are too small go before a new one is made"
    buffers.give_back(large)
    assert free_bytes(buffers) == 0


def test_what_was_not_lent_cannot_be_given_back() -> None:
    buffers = Buffers(8 * MIB)
    view = buffers.take(10)
    with pytest.raises(KeyError):
        buffers.give_back(view[:5])
    buffers.give_back(view)
    with pytest.raises(KeyError):
        buffers.give_back(view)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12),
    st.lists(st.one_of(st.integers(0, 6 * MIB), st.integers(-10, -1)), max_size=40),
)
def test_views_in_use_never_overlap(keep: int, steps: list[int]) -> None:
    """A number takes so many bytes; a negative one gives back the view that many places from the end."""
    buffers = Buffers(keep * MIB)
    held: list[tuple[memoryview, int]] = []
    for number, step in enumerate(steps):
        if step >= 0:
            view = buffers.take(step)
            assert len(view) == step
            for place in {0, step // 2, step - 1} if step else ():
                view[place] = number
            held.append((view, number))
        elif len(held) >= -step:
            buffers.give_back(held.pop(step)[0])
        assert free_bytes(buffers) <= keep * MIB
        assert len(buffers._lent) == len(held)
        for view, mark in held:
            for place in {0, len(view) // 2, len(view) - 1} if len(view) else ():
                assert view[place] == mark


def test_threads_do_not_share_a_buffer() -> None:
    buffers = Buffers(4 * MIB)
    clashes = []

    def work(mark: int) -> None:
        for _ in range(200):
            view = buffers.take(64)
            view[:] = bytes([mark]) * 64
            if bytes(view) != bytes([mark]) * 64:
                clashes.append(mark)
            buffers.give_back(view)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert not clashes
    assert not buffers._lent
    assert free_bytes(buffers) <= 4 * MIB
