"""Sums over what a layer reads, batch by batch: how `calibration.InputStatistics` come about."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.calibration import BLOCK_COLUMNS, WHOLE_COLUMNS, InputStatistics
from fleetpress.compression.device import CPU

_STRIP = 256  # columns that are multiplied with themselves and those behind them at a time,
_NARROW_STRIP, _NARROW = 128, 1024  # so many in matrices of up to so many columns (measured)
_RUN = 16  # rows that are summed in their own dtype before the sums are doubles
_TILE_ELEMENTS = 1 << 18  # of a histogram at a time: what is worked out on the way stays in the cache


@dataclass(kw_only=True)
class InputSums:
    """Sums over the inputs of one node, as operators of one geometry read them; `statistics` once all were added."""

    rows: int = 0
    total: Tensor | None = None
    gram: Tensor | None = None
    range: Tensor | None = None
    histogram: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Input rows x [rows, G, columns]."""
        _, groups, columns = x.shape
        if self.total is None:
            size = columns if columns <= WHOLE_COLUMNS else BLOCK_COLUMNS
            blocks = math.ceil(columns / size)
            self.total = x.new_zeros(groups, columns, dtype=torch.float64)
            self.gram = x.new_zeros(groups, blocks, size, size, dtype=torch.float32)
        assert self.gram is not None
        self.rows += x.shape[0]
        self.total += _sum_of_rows(x)
        size = self.gram.shape[-1]
        padded = functional.pad(x, (0, -columns % size)) if columns % size else x
        parts = padded.reshape(x.shape[0], groups, -1, size).permute(1, 2, 3, 0)  # [G, blocks, size, rows]
        for mine, part in zip(self.gram.flatten(0, 1), parts.flatten(0, 1), strict=True):
            add_upper_products(mine, part)

    def add_range(self, x: Tensor) -> None:
        """All entries that are read, sampled or not."""
        low, high = (end.float() for end in x.aminmax())
        if self.range is not None:
            low, high = torch.minimum(low, self.range[0]), torch.maximum(high, self.range[1])
        self.range = torch.stack([low, high])
        if self.histogram is None:
            self.histogram = torch.zeros(1 << 12, dtype=torch.int64, device=x.device)
        for tile in torch.split(x.detach().reshape(-1), _TILE_ELEMENTS):
            upper_bits = tile.float().view(torch.int32).bitwise_right_shift(20).bitwise_and_(0xFFF)
            self.histogram += torch.bincount(upper_bits, minlength=1 << 12)

    def statistics(self) -> InputStatistics | None:
        """What was added, on the CPU; None if nothing was: a branch that was never taken."""
        if self.total is None:
            return None
        assert self.gram is not None
        assert self.range is not None
        assert self.histogram is not None
        groups, columns = self.total.shape
        for gram in self.gram.flatten(0, 1):
            mirror_upper(gram)
        squares = self.gram.diagonal(dim1=-2, dim2=-1).reshape(groups, -1)[:, :columns]
        return InputStatistics(
            rows=self.rows,
            total=self.total.to(CPU),
            squares=squares.double().to(CPU),
            gram=self.gram.to(CPU),
            range=self.range.to(CPU),
            histogram=self.histogram.to(CPU),
        )


def add_upper_products(gram: Tensor, columns: Tensor) -> None:
    """Add C C^T to the upper triangle of `gram` [n, n] in place, C = `columns` [n, rows].

    Strip by strip, which takes little more than half of the operations of the whole product; what lies in a strip's own
    block below the diagonal is written, too.
    """
    strip = _STRIP if gram.shape[0] > _NARROW else _NARROW_STRIP
    for start in range(0, gram.shape[0], strip):
        stop = start + strip
        gram[start:stop, start:].addmm_(columns[start:stop], columns[start:].t())


def mirror_upper(gram: Tensor) -> None:
    """Write the upper triangle of `gram` [n, n] over the lower one, in place."""
    for start in range(0, gram.shape[0], _STRIP):
        stop = start + _STRIP
        own = gram[start:stop, start:stop]
        own.copy_(own.triu().add_(own.triu(1).t()))
        gram[stop:, start:stop].copy_(gram[start:stop, stop:].t())


def _sum_of_rows(x: Tensor) -> Tensor:
    """The sum of x [rows, ...] over its rows, float64; a short run of rows is added in x's own dtype, far faster."""
    whole = x.shape[0] // _RUN * _RUN
    total = x[whole:].sum(0, dtype=torch.float64)
    if whole:
        total += x[:whole].reshape(-1, _RUN, *x.shape[1:]).sum(1).sum(0, dtype=torch.float64)
    return total
