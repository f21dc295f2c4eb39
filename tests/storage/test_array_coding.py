"""Arrays come back to the last bit from fewer bytes, near their entropy; what no writer gives is refused."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fleetpress.storage import symbol_coding
from fleetpress.storage.array_coding import Array, ArrayReader, ArrayWriter, Layout
from fleetpress.storage.bit_stream import BitReader, BitWriter

GOLDEN = (
    "03000455b5fc0227050c0300010030fd040381030080020001000100",
    "6bfd19542b28081f582af7f48105227e037459dd8d73cf6c462be9671cdc0fe27f590e41ff8b9dd051dedbafc6527500cee7"
    "ed1fdca4b1fc8f71a3de5e8fd858951d37e4351cd2b334bcf7c66becd496b604c3b9b13eec5da93ef409e513a9f16bd03789"
    "3790aea80926b1ecd38cce567a85055d5118e48c93d8e5d30529358b8b05af590a3401e9888ae859a8c22533ab9405",
    "70636f210300050a040105270000020000c81b01018000000040000200000000800001000080004040e04090e018406890b8e0",
)
FLOATS = ("<f2", "<f4", "<f8")
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def written(*arrays: Array) -> tuple[bytes, bytes, bytes]:
    writer = ArrayWriter()
    for array in arrays:
        writer.add(array, is_float=array.dtype.str in FLOATS)
    directory, decisions, blobs = writer.sections()
    return directory, decisions, b"".join(blobs)


def read(sections: tuple[bytes, bytes, bytes], *layouts: Layout) -> list[Array]:
    with ThreadPoolExecutor(2) as pool:
        reader = ArrayReader(sections[0], sections[1], memoryview(sections[2]), pool)
        waiting = [reader.read(layout) for layout in layouts]
        reader.end()
        return [finish() for finish in waiting]


def layout_of(array: Array) -> Layout:
    kind = array.dtype.str.replace("|", "<")
    return Layout(shape=array.shape, dtype=kind, is_float=kind in FLOATS)


def assert_round_trip(*arrays: Array) -> int:
    """The bytes that they take."""
    sections = written(*arrays)
    for array, found in zip(arrays, read(sections, *map(layout_of, arrays)), strict=True):
        assert (found.shape, found.dtype) == (array.shape, array.dtype.newbyteorder("="))
        assert found.tobytes() == array.tobytes()
    assert written(*arrays) == sections
    return sum(map(len, sections))


@quick
@given(
    st.lists(
        st.sampled_from(["|u1", "<i8", "<u2", *FLOATS]).flatmap(
            lambda kind: hnp.arrays(
                np.dtype(kind),
                hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
                elements={"allow_nan": True} if kind in FLOATS else None,
            )
        ),
        max_size=4,
    )
)
def test_any_arrays_come_back(arrays: list[Array]) -> None:
    assert_round_trip(*arrays)


@quick
@given(
    codes=hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 90)), elements=st.integers(0, 255)
    ),
    mask=st.integers(0, 255),
)
def test_any_codes_come_back(codes: Array, mask: int) -> None:
    codes = codes & np.uint8(mask)
    if codes.min() == codes.max():
        return
    header, writer = symbol_coding.encode(codes)
    found = symbol_coding.decode(BitReader(writer.data()), header, codes.shape)
    assert np.array_equal(found, codes)


def random_codes(shape: tuple[int, ...], chances: list[float]) -> Array:
    return np.random.default_rng(0).choice(len(chances), shape, p=chances).astype(np.uint8)


def entropy_bytes(codes: Array) -> float:
    counts = np.bincount(codes.ravel())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@pytest.mark.parametrize(
    ("shape", "chances", "most"),
    [
        ((64, 60), [0.25, 0.5, 0.25], 1.03),  # the slow models
        ((40, 100), [0.015, 0.97, 0.015], 1.10),
        ((2000, 600), [0.05, 0.1, 0.2, 0.3, 0.2, 0.1, 0.05], 1.002),  # pcodec
        ((2000, 600), [0.02, 0.95, 0.03], 1.005),
    ],
)
def test_codes_take_their_entropy(shape: tuple[int, ...], chances: list[float], most: float) -> None:
    codes = random_codes(shape, chances)
    assert assert_round_trip(codes) < most * entropy_bytes(codes)


def test_dead_columns_and_busy_rows_take_less_than_the_entropy_of_their_codes() -> None:
    codes = random_codes((100, 60), [0.1, 0.8, 0.1])
    codes[:, ::2] = 1
    assert assert_round_trip(codes) < 0.95 * entropy_bytes(codes)
    assert assert_round_trip(np.ascontiguousarray(codes.T)) < 0.95 * entropy_bytes(codes)


def test_floats_take_what_is_random_in_them() -> None:
    normal = np.random.default_rng(0).standard_normal((50, 40)).astype("<f4")
    assert assert_round_trip(normal) < 0.86 * normal.nbytes  # exponents: some three of eight bits
    rounded = normal.astype("<f2").astype("<f4")
    assert assert_round_trip(rounded) < 0.5 * normal.nbytes
    sparse = np.where(np.random.default_rng(1).random(normal.shape) < 0.9, 0, normal).astype("<f4")
    assert assert_round_trip(sparse) < 0.12 * normal.nbytes
    signs = np.where(normal > 0, 0.0, -0.0).astype("<f4")  # a negative zero is no zero
    assert_round_trip(signs, np.array([np.nan, -np.nan, np.inf, 0.0], "<f4"))


def test_constants_and_counters_take_bytes() -> None:
    assert assert_round_trip(np.zeros((100, 100), "<f4")) < 4
    assert assert_round_trip(np.full(1000, 1.5, "<f8")) < 12
    assert assert_round_trip(np.array(7, "<i8")) < 5
    assert assert_round_trip(np.arange(512, dtype="<i8")) < 50


def test_bytes_of_the_format_do_not_change() -> None:
    """What these libraries wrote once they write and read for ever; else the format needs another number."""
    codes = (np.arange(480).reshape(12, 40) ** 2 % 31 % 5).astype(np.uint8)
    scale = (np.arange(1, 41) / 64).astype("<f4")
    zeros = np.where(np.arange(64) % 5, 0, np.arange(64) / 8).astype("<f4").reshape(8, 8)
    sections = written(codes, scale, zeros)
    assert tuple(part.hex() for part in sections) == GOLDEN
    assert all(
        np.array_equal(found, array)
        for found, array in zip(
            read(tuple(map(bytes.fromhex, GOLDEN)), *map(layout_of, (codes, scale, zeros))),  # type: ignore[arg-type]
            (codes, scale, zeros),
            strict=True,
        )
    )


def test_chances_are_the_same_whole_numbers_everywhere() -> None:
    """Each value of the tables is far from where rounding turns, so no machine rounds it otherwise."""
    chance = np.clip(np.arange(1 << 16), 1, 65535)
    odds = 256 * np.log(chance / (65536 - chance))
    logistic = 65536 / (1 + np.exp(-np.arange(-3071, 3072) / 256))
    for exact in (odds[odds != 0], logistic):
        assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-7


@pytest.mark.parametrize(
    ("sections", "layout"),
    [
        ((b"\x09", b"", b""), Layout(shape=(2,), dtype="<u1")),
        ((b"", b"", b""), Layout(shape=(2,), dtype="<u1")),
        ((b"\x00", b"", b"1"), Layout(shape=(2,), dtype="<u1")),
        ((b"\x00", b"", b"123"), Layout(shape=(2,), dtype="<u1")),
        ((b"\x01\x05", b"", b""), Layout(shape=(2,), dtype="<f4", is_float=True)),
        ((b"\x02\x01", b"", b"x"), Layout(shape=(2,), dtype="<u1")),
        ((b"\x02\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"", b"x"), Layout(shape=(2,), dtype="<u1")),
        ((b"\x03\x00\x00\x00\x00\x00", b"", b""), Layout(shape=(2,), dtype="<u1")),
        ((b"\x03\xff\xff\xff\xff\x00", b"\xff" * 9, b""), Layout(shape=(9,), dtype="<u1")),
        ((b"\x03\x00\x01\x01\x00\x00", b"", b""), Layout(shape=(1 << 20,), dtype="<u1")),
        ((b"\x04", b"", b""), Layout(shape=(2,), dtype="<u1")),
        ((b"\x05\x03", b"", b""), Layout(shape=(2,), dtype="<f4", is_float=True)),
        ((b"\x05\x01\x01\x01\x01\x01\x01\x01", b"", b""), Layout(shape=(2,), dtype="<f4", is_float=True)),
    ],
)  # fmt: skip
def test_what_no_writer_gives_is_a_value_error(sections: Any, layout: Layout) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read(sections, layout)


def test_nothing_takes_nothing() -> None:
    assert BitWriter().data() == b""
    assert assert_round_trip(np.zeros((0, 3), "<f4")) == 1
