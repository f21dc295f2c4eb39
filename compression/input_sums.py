"""Sums over what a layer reads, batch by batch: how `calibration.InputStatistics` come about."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.calibration import InputStatistics, block_columns, input_tensors
from fleetpress.compression.device import CPU
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.triangles import add_products, diagonals, packed_length

_RUN = 16  # rows that are summed in their own dtype before the sums are doubles
_TILE_ELEMENTS = 1 << 18  # of a histogram at a time: what is worked out on the way stays in the cache


@dataclass(kw_only=True)
class InputSums:
    """Sums over the inputs of one node, as operators of one geometry read them; `statistics` once all were added.

    Products are kept within blocks of `size` columns, if that is None as `block_columns` says; their upper triangles
    are `triangles` [G, blocks, ...].
    """

    size: int | None = None
    rows: int = 0
    total: Tensor | None = None
    triangles: Tensor | None = None
    range: Tensor | None = None
    histogram: Tensor | None = None
    importance: Tensor | None = None

    def add(self, x: Tensor, importance: Tensor | None = None) -> None:
        """Input rows x [rows, G, columns]; doubles are rounded to float32, in which products are kept.

        With `importance` [rows, G], float64, every product is times its row's.
        """
        x = x.float() if x.dtype == torch.float64 else x
        weighed = x
        if importance is not None:
            total = importance.sum(0)
            self.importance = total if self.importance is None else self.importance + total
            root = importance.sqrt().to(x.dtype).unsqueeze(2)
            x = x * root  # so that a product of two is times the importance
            weighed = x * root
        _, groups, columns = x.shape
        if self.total is None:
            self.size = block_columns(columns) if self.size is None else min(self.size, columns)
            blocks = math.ceil(columns / self.size)
            self.total = x.new_zeros(groups, columns, dtype=torch.float64)
            self.triangles = x.new_zeros(groups, blocks, packed_length(self.size), dtype=torch.float32)
        assert self.triangles is not None
        assert self.size is not None
        self.rows += x.shape[0]
        self.total += _sum_of_rows(weighed)
        padded = functional.pad(x, (0, -columns % self.size)) if columns % self.size else x
        parts = padded.reshape(x.shape[0], groups, -1, self.size).permute(
            1, 2, 3, 0
        )  # [G, blocks, size, rows]
        for mine, part in zip(self.triangles.flatten(0, 1), parts.flatten(0, 1), strict=True):
            add_products(mine, part)

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

    def statistics(self, weight: str) -> InputStatistics | None:
        """What was added, on the CPU; None if nothing was: a branch that was never taken.

        Raises DataMismatchError, which names the `weight` that reads it, for what is not finite.
        """
        tensors = self.tensors(weight)
        return None if tensors is None else InputStatistics.summed([tensors])

    def tensors(self, weight: str) -> dict[str, Tensor] | None:
        """The same as plain tensors, in half of the memory: what `InputStatistics.summed` takes."""
        if self.total is None:
            return None
        assert self.triangles is not None
        assert self.size is not None
        assert self.range is not None
        assert self.histogram is not None
        groups, columns = self.total.shape
        squares = diagonals(self.triangles, self.size).reshape(groups, -1)[:, :columns]
        if not (self.range.isfinite().all() and squares.isfinite().all()):  # no product is above all squares
            raise DataMismatchError(
                f"{weight} reads NaN, infinity or numbers that are too large; look for them in the data, and in the "
                "weights before it"
            )
        return input_tensors(
            rows=self.rows,
            total=self.total.to(CPU),
            squares=squares.double().to(CPU),
            triangles=self.triangles.to(CPU),
            size=self.size,
            range=self.range.to(CPU),
            histogram=self.histogram.to(CPU),
            importance=None if self.importance is None else self.importance.to(CPU),
        )


def _sum_of_rows(x: Tensor) -> Tensor:
    """The sum of x [rows, ...] over its rows, float64; a short run of rows is added in x's own dtype, far faster."""
    whole = x.shape[0] // _RUN * _RUN
    total = x[whole:].sum(0, dtype=torch.float64)
    if whole:
        total += x[:whole].reshape(-1, _RUN, *x.shape[1:]).sum(1).sum(0, dtype=torch.float64)
    return total
