"""Tiles are runs of rows; values that are not finite are found in their bits, in every dtype that has them."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fleetpress.compression.checkpoint.tiles import Geometry, check_finite, shape_bytes, tiles
from fleetpress.compression.errors import NotFiniteError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw(values: Tensor) -> memoryview:
    return memoryview(bytearray(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 60))
def test_tiles_cover_a_block_in_order(tile_rows: int, row_bytes: int, rows: int) -> None:
    view = memoryview(bytes(index % 256 for index in range(rows * row_bytes)))
    cut = Geometry(rows=rows, row_bytes=row_bytes, tile_rows=tile_rows)
    found = list(tiles(view, cut))
    assert b"".join(found) == view
    assert all(len(tile) == tile_rows * row_bytes for tile in found[:-1])
    assert all(0 < len(tile) <= tile_rows * row_bytes for tile in found[-1:])
    assert len(found) == -(-rows // tile_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_values_of_every_size_pass(dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype])
    values = torch.tensor(
        [0.0, -0.0, 1.0, info.max, info.min, info.tiny, info.smallest_normal / 2], dtype=DTYPES[dtype]
    )
    check_finite("a.weight", dtype, raw(values))
    check_finite("a.weight", dtype, memoryview(b""))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([float("nan")], "a.weight holds NaN values (1 of the 100 in one block"),
        ([-float("nan"), float("nan")], "a.weight holds NaN values (2 of the 100"),
        ([float("inf")], "a.weight holds infinite values (1 of the 100"),
        ([-float("inf"), float("inf"), float("inf")], "a.weight holds infinite values (3 of the 100"),
        ([float("inf"), float("nan")], "a.weight holds NaN values (2 of the 100"),
    ],
)
def test_what_is_not_finite_is_named_and_counted(dtype: str, bad: list[float], words: str) -> None:
    values = torch.linspace(-1, 1, 100, dtype=DTYPES[dtype])
    values[7 : 7 + len(bad)] = torch.tensor(bad, dtype=DTYPES[dtype])
    with pytest.raises(NotFiniteError, match=re.escape(words)) as told:
        check_finite("a.weight", dtype, raw(values))
    assert "take the last good state of the model" in str(told.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nan_is_one(dtype: str) -> None:
    """Signalling ones, too, whose fraction is all in the lowest bit."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[DTYPES[dtype].itemsize]
    infinite = torch.tensor([float("inf")], dtype=DTYPES[dtype]).view(integer)
    with pytest.raises(NotFiniteError, match="NaN"):
        check_finite("a", dtype, raw(infinite + 1))
    with pytest.raises(NotFiniteError, match="infinite"):
        check_finite("a", dtype, raw(infinite))


def test_bytes_may_lie_at_odd_addresses() -> None:
    data = bytearray(9)
    data[1:] = raw(torch.tensor([1.0, float("nan")]))
    with pytest.raises(NotFiniteError, match="NaN"):
        check_finite("a", "F32", memoryview(data)[1:])


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4"])
def test_other_dtypes_are_not_looked_at(dtype: str) -> None:
    check_finite("a", dtype, memoryview(b"\xff" * 16))


def test_a_shape_is_two_whole_numbers_of_eight_bytes() -> None:
    assert shape_bytes((3, 70_000)) == bytes(raw(torch.tensor([3, 70_000])))
