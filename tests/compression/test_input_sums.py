"""Sums of what a layer reads are those of the rows, however these come in batches, strips and tiles."""

import pytest
import torch

from fleetpress.compression import input_sums
from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.input_sums import InputSums


def rows(count: int, groups: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, groups, columns, generator=generator) + 0.3


def summed(x: torch.Tensor, *batches: int) -> InputStatistics:
    sums = InputSums()
    for batch in torch.split(x, batches or (len(x),)):
        sums.add_range(batch)
        sums.add(batch)
    found = sums.statistics()
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


def test_long_rows_are_multiplied_within_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_sums, "WHOLE_COLUMNS", 400)
    x = rows(40, 1, 1300)
    found = summed(x)
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


def test_nothing_was_read() -> None:
    assert InputSums().statistics() is None
