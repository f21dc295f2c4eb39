"""Sums of what a layer reads are those of the rows, however these come in batches, strips and tiles."""

import pytest
import torch

from fleetpress.compression import input_sums
from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.input_sums import InputSums


def rows(count: int, groups: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, groups, columns, generator=generator) + 0.3


def summed(x: torch.Tensor, *batches: int, size: int | None = None) -> InputStatistics:
    sums = InputSums(size=size)
    for batch in torch.split(x, batches or (len(x),)):
        sums.add_range(batch)
        sums.add(batch)
    found = sums.statistics("w")
    assert found is not None
    return found


@pytest.mark.parametrize("columns", [7, 300, 1100])  # within a strip, over narrow ones, over wide ones
def test_sums_are_those_of_the_rows(columns: int) -> None:
    x = rows(53, 2, columns)
    found = summed(x, 20, 33)
    exact = x.double()
    gram = torch.einsum("ngi,ngj->gij", exact, exact)
    assert found.rows == 53
    assert found.gram.shape == (2, 1, columns, columns)
    assert torch.equal(found.gram, found.gram.mT)
    assert torch.allclose(found.gram[:, 0].double(), gram, rtol=1e-5, atol=1e-4)
    assert torch.allclose(found.total, exact.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.squares, found.gram[:, 0].diagonal(dim1=-2, dim2=-1).double())
    assert found.range.tolist() == [float(x.min()), float(x.max())]


def test_doubles_are_summed_as_floats() -> None:
    x = rows(20, 2, 7)
    single, double = summed(x), summed(x.double())
    for name, value in vars(single).items():
        other = getattr(double, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def test_long_rows_are_multiplied_within_blocks() -> None:
    x = rows(40, 1, 1300)
    found = summed(x, size=512)
    assert found.gram.shape == (1, 3, 512, 512)
    exact = x[:, 0].double().T @ x[:, 0].double()
    for columns, block in found.blocks():
        assert torch.allclose(block.double(), exact[columns, columns], rtol=1e-5, atol=1e-4)
        assert torch.equal(block, block.T)
    assert not found.gram[0, 2, 1300 - 1024 :].any()  # beyond the last column
    assert found.squares.shape == (1, 1300)


def test_a_histogram_holds_every_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_sums, "_TILE_ELEMENTS", 100)
    x = rows(31, 1, 17)
    expected = torch.bincount((x.flatten().view(torch.int32) >> 20) & 0xFFF, minlength=4096)
    for found in (summed(x), summed(x, 10, 10, 11)):
        assert found.histogram is not None
        assert torch.equal(found.histogram, expected)


@pytest.mark.parametrize("size", [None, 512])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])  # the last: its square
def test_what_is_no_number_is_told_by_who_reads_it(bad: float, size: int | None) -> None:
    x = rows(20, 1, 700)
    x[7, 0, 600] = bad
    with pytest.raises(
        DataMismatchError, match=r"^w reads NaN, infinity or numbers that are too large; look for them"
    ):
        summed(x, 10, 10, size=size)


def test_what_was_not_looked_at_closely_must_be_finite_too() -> None:
    sums, x = InputSums(), rows(20, 1, 7)
    sums.add(x)
    x[3, 0, 3] = torch.nan
    sums.add_range(x)  # of a convolution all entries, of which only some are multiplied
    with pytest.raises(DataMismatchError, match="w reads NaN"):
        sums.tensors("w")


@pytest.mark.parametrize(("columns", "size"), [(9, None), (300, None), (1100, None), (700, 512)])
def test_parts_add_up_to_the_sums_of_all_rows(columns: int, size: int | None) -> None:
    x = rows(30, 2, columns)
    parts = []
    for part in (x[:11], x[11:]):
        sums = InputSums(size=size)
        sums.add_range(part)
        sums.add(part)
        parts.append(sums)
    tensors = [sums.tensors("w") for sums in parts]
    found = InputStatistics.summed(one for one in tensors if one is not None)
    first, second = (one for one in (sums.statistics("w") for sums in parts) if one is not None)
    expected = first.merge(second)
    for name, value in vars(expected).items():
        mine = getattr(found, name)
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value
    again = InputStatistics.summed([found.to_tensors()])
    assert torch.equal(again.gram, found.gram)
    packed = found.to_tensors()["triangles"]
    assert packed.numel() < found.gram.numel() * (0.62 if columns == 1100 else 1.01)
    with pytest.raises(DataMismatchError, match="of different programs"):
        InputStatistics.summed([found.to_tensors(), summed(x[:, :1]).to_tensors()])
    with pytest.raises(DataMismatchError, match="there are no calibration statistics"):
        InputStatistics.summed([])


def test_nothing_was_read() -> None:
    assert InputSums().statistics("w") is None
