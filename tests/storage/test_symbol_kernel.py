"""Compiled code and NumPy make the same decisions under the same chances, whatever is written or read."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fleetpress.storage import symbol_coding, symbol_kernel
from fleetpress.storage.bit_stream import BitReader, BitWriter
from fleetpress.storage.symbol_coding import Codes, Symbols

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
MATRICES = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 140)), elements=st.integers(0, 255)
)


T = TypeVar("T")


def both(work: Callable[[], T]) -> tuple[T, T]:
    """What it gives with the library, and without."""
    assert symbol_kernel.available()
    with pytest.MonkeyPatch.context() as patch:
        compiled = work()
        patch.setenv("FLEETPRESS_NO_KERNELS", "1")
        assert not symbol_kernel.available()
        return compiled, work()


def decoded(data: bytes, *parts: tuple[bytes, tuple[int, int]]) -> list[bytes] | str:
    """Matrices of one stream, or why they are none."""
    try:
        reader = BitReader(data)
        return [symbol_coding.decode(reader, header, shape).tobytes() for header, shape in parts]
    except ValueError as error:
        return str(error)


@quick
@given(first=MATRICES, second=MATRICES, mask=st.sampled_from([1, 3, 7, 64, 129, 255]))
def test_what_one_writes_the_other_reads(first: Codes, second: Codes, mask: int) -> None:
    matrices = [codes & np.uint8(mask) for codes in (first, second)]
    matrices = [codes for codes in matrices if codes.min() < codes.max()]

    def write() -> tuple[list[bytes], bytes, int]:
        headers, writer = [], BitWriter()
        for codes in matrices:
            header, mine = symbol_coding.encode(codes)
            headers.append(header)
            writer.extend(mine)
        return headers, writer.data(), writer.cost()

    compiled, plain = both(write)
    assert compiled == plain
    headers, data, _ = compiled
    parts = [(header, codes.shape) for header, codes in zip(headers, matrices, strict=True)]
    wanted = [codes.tobytes() for codes in matrices]
    assert both(lambda: decoded(data, *parts)) == (wanted, wanted)  # type: ignore[arg-type]


@quick
@given(
    data=st.binary(max_size=60),
    header=st.binary(min_size=5, max_size=5),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 80)),
)
def test_noise_is_read_alike(data: bytes, header: bytes, shape: tuple[int, int]) -> None:
    compiled, plain = both(lambda: decoded(data, (header, shape), (header, shape)))
    assert compiled == plain


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_every_model_of_many_codes(alike: bool, by_columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks grow to their largest, and distances beyond the steps are told as bytes."""
    spread = np.random.default_rng(1).standard_t(2, (90, 300)) * 5 + 100
    codes = np.clip(np.where(spread > 104, spread, 100), 0, 255).astype(np.uint8)
    symbols = Symbols(
        commonest=100, furthest=155, others=20_000, above=200, by_columns=by_columns, alike=alike
    )
    turned = codes.T if by_columns else codes
    chances, bits = symbol_kernel.written_symbols(turned, symbol_coding._shares(symbols))
    writer = BitWriter()
    symbol_coding._code(writer, symbols, codes.shape, codes.astype(np.int64))
    assert np.array_equal(np.concatenate(writer._ones), chances)
    assert np.array_equal(np.concatenate(writer._bits), bits)
    found = symbol_coding.decode(BitReader(writer.data()), symbols.header(), codes.shape)
    assert np.array_equal(found, codes)


def test_a_library_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbol_kernel, "_VERSION", 99)
    symbol_kernel._library.cache_clear()
    with pytest.raises(
        ImportError, match=r"_symbols.* has version 1, wanted is 99; install fleetpress again"
    ):
        symbol_kernel.available()
    symbol_kernel._library.cache_clear()
