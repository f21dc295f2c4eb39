"""Sums over the inputs of a layer, batch by batch: what `calibration.InputStatistics` are made of."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.calibration import BLOCK_COLUMNS, WHOLE_COLUMNS, InputStatistics
from fleetpress.compression.device import CPU

_HISTOGRAM_BINS = 1 << 12


@dataclass(kw_only=True)
class InputSums:
    """Sums over the inputs of one node, as operators of one geometry read them."""

    rows: int = 0
    total: Tensor | None = None
    squares: Tensor | None = None
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
            self.squares = x.new_zeros(groups, columns, dtype=torch.float64)
            self.gram = x.new_zeros(groups, blocks, size, size, dtype=torch.float32)
        assert self.squares is not None
        assert self.gram is not None
        self.rows += x.shape[0]
        self.total += x.sum(0, dtype=torch.float64)
        size = self.gram.shape[-1]
        padded = functional.pad(x, (0, -columns % size)) if columns % size else x
        parts = padded.reshape(x.shape[0], groups, -1, size).permute(1, 2, 3, 0)  # [G, blocks, size, rows]
        for mine, part in zip(self.gram.flatten(0, 1), parts.flatten(0, 1), strict=True):
            mine.addmm_(part, part.t())
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1).reshape(groups, -1)[:, :columns]
        self.squares.copy_(diagonal)

    def add_range(self, x: Tensor) -> None:
        """All entries that are read, sampled or not."""
        low, high = x.amin().float(), x.amax().float()
        if self.range is not None:
            low, high = torch.minimum(low, self.range[0]), torch.maximum(high, self.range[1])
        self.range = torch.stack([low, high])
        upper_bits = (x.detach().float().flatten().view(torch.int32) >> 20) & 0xFFF
        counts = torch.bincount(upper_bits, minlength=_HISTOGRAM_BINS)
        self.histogram = counts if self.histogram is None else self.histogram + counts

    def statistics(self) -> InputStatistics | None:
        """What was added up, on the CPU; None if nothing was."""
        if self.total is None:
            return None
        assert self.squares is not None
        assert self.gram is not None
        assert self.range is not None
        assert self.histogram is not None
        return InputStatistics(
            rows=self.rows,
            total=self.total.to(CPU),
            squares=self.squares.to(CPU),
            gram=self.gram.to(CPU),
            range=self.range.to(CPU),
            histogram=self.histogram.to(CPU),
        )
