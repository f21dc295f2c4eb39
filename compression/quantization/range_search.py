"""Search each group's range for the smallest squared error: few weights lie at the ends.

All candidates are tried on one tile of rows before the next one is looked at, in buffers that are reused: memory does
not grow with the weight, and what is computed over and over stays in the cache.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fleetpress.compression.errors import MethodError
from fleetpress.compression.quantization import affine, codebook_scales
from fleetpress.compression.scheme import QuantScheme

_SHARES = [step / 100 for step in range(98, 48, -2)]  # of the full range, tried in this order
_TILE_ELEMENTS = (
    1 << 18
)  # a tile and its two buffers fit into a core's cache (measured: 2^16 to 2^20 are alike)


def best_scales(rows: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of `rows` [output units, entries], shaped as by `affine.quantization_parameters`.

    Rows do not depend on each other, except for strategy tensor, which takes the whole weight.
    Raises QuantizationError for bad values, MethodError for FP8.
    """
    if scheme.type == "codebook":
        return codebook_scales.best_scales(rows, scheme), None
    if scheme.type != "int":
        raise MethodError("smallest_error chooses ranges of integer codes; FP8 takes round_to_nearest")
    full, zero_point = affine.quantization_parameters(rows, scheme)
    if scheme.strategy == "tensor":
        return _best_of_all(rows, full, zero_point, scheme), zero_point
    trial = _Trial(rows, scheme)
    best = full.clone()
    for at in trial.tiles():
        trial.load(rows[at], None if zero_point is None else zero_point[at])
        least = trial.errors(full[at])
        for share in _SHARES:
            scale = _narrowed(full[at], share)
            error = trial.errors(scale)
            better = error < least
            torch.where(better, scale, best[at], out=best[at])
            torch.where(better, error, least, out=least)
    return best, zero_point


def _best_of_all(rows: Tensor, full: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """The one scale [1, 1] with the smallest sum over all rows. Sums are exact, so no order of adding decides."""
    candidates = [full, *(_narrowed(full, share) for share in _SHARES)]
    trial = _Trial(rows, scheme)
    errors = torch.empty(len(candidates), rows.shape[0], dtype=trial.dtype)
    for at in trial.tiles():
        trial.load(rows[at], zero_point)
        for candidate, scale in enumerate(candidates):
            errors[candidate, at] = trial.errors(scale)[:, 0]
    totals = [math.fsum(candidate.tolist()) for candidate in errors]
    return candidates[totals.index(min(totals))]


def _narrowed(full: Tensor, share: float) -> Tensor:
    scale = full * share
    return torch.where(scale == 0, full, scale)


class _Trial:
    """Squared errors of a tile of rows under one scale after another."""

    def __init__(self, rows: Tensor, scheme: QuantScheme) -> None:
        self._rows, columns = rows.shape
        self._group = min(scheme.group_size or columns, columns)
        self._columns = columns
        self._middle = scheme.middle
        self._step = max(1, min(_TILE_ELEMENTS // columns, self._rows))
        self.dtype = torch.promote_types(rows.dtype, torch.float32)
        # Two rows at least: a single sum would be split among threads, and then rounds as they do.
        shape = max(2, self._step), columns + -columns % self._group
        self._weight = torch.zeros(
            shape, dtype=self.dtype
        )  # what pads a shorter last group stays zero: no error
        self._work = torch.zeros(shape, dtype=self.dtype)
        self._rounded = None if rows.dtype == self.dtype else torch.empty(shape, dtype=rows.dtype)
        self._zero: Tensor | None = None

    def tiles(self) -> Iterator[slice]:
        """The rows of one tile after another."""
        for start in range(0, self._rows, self._step):
            yield slice(start, min(start + self._step, self._rows))

    def load(self, rows: Tensor, zero_point: Tensor | None) -> None:
        """The tile that `errors` is about, and its zero points."""
        self._count = rows.shape[0]
        self._weight[: self._count, : self._columns] = rows
        self._zero = None
        if zero_point is not None:
            self._zero = (zero_point.to(self.dtype) - self._middle).unsqueeze(-1)

    def errors(self, scale: Tensor) -> Tensor:
        """Sum of squares of every group [rows, groups] under `scale`, in the arithmetic of `affine`."""
        weight, work = self._weight[: self._count], self._work[: self._count]
        groups, step = self._grouped(work), scale.to(self.dtype).unsqueeze(-1)
        torch.div(self._grouped(weight), step, out=groups)
        if self._zero is not None:
            groups.add_(self._zero)
        work.clamp_(-self._middle, self._middle - 1).round_()
        if self._zero is not None:
            groups.sub_(self._zero)
        groups.mul_(step)
        self._round(work)
        work.sub_(weight)
        self._round(work)
        work.square_()
        if self._count == 1:
            self._work[1].zero_()
        return self._grouped(self._work[: max(2, self._count)]).sum(-1)[: self._count]

    def _grouped(self, tile: Tensor) -> Tensor:
        return tile.view(tile.shape[0], -1, self._group)

    def _round(self, tile: Tensor) -> None:
        """What the weight's dtype makes of the values."""
        if self._rounded is not None:
            tile.copy_(self._rounded[: self._count].copy_(tile))
