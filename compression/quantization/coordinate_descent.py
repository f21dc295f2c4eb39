"""Coordinate descent: each code, and each scale, in turn takes the value that changes the outputs least."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.quantization.column_grid import ColumnGrid
from fleetpress.compression.quantization.error_feedback import compensated_in_the_better_range
from fleetpress.compression.quantization.output_error import output_squares
from fleetpress.compression.quantization.weight import QuantizedWeight, QuantizeMethod
from fleetpress.compression.scheme import QuantScheme

SWEEPS = 4
_BLOCK = 128  # columns whose products with the error are taken together


def coordinate_descent(
    rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None
) -> QuantizedWeight:
    """Codes, scales and zero points of `rows` [output units, entries], from the codes of `gptq` on.

    `SWEEPS` times over all columns: with everything else as it is, tr(D G D^T) is a parabola in one code, so the code
    nearest to its lowest point is the best; the same holds for a group's scale, except for strategy tensor, where all
    units share it. No unit's error of the outputs ends larger than with gptq. Raises QuantizationError for bad values.
    """
    assert statistics is not None, "a method that needs inputs is called with statistics"
    inputs = statistics.inputs
    start = compensated_in_the_better_range(rows, scheme, inputs)
    found = _Descent(rows, start, inputs).run()
    before, after = (output_squares(item.dequantize() - rows, inputs) for item in (start, found))
    worse = (after > before).unsqueeze(1)  # by rounding alone
    scale = found.scale if scheme.strategy == "tensor" else torch.where(worse, start.scale, found.scale)
    return QuantizedWeight(
        codes=torch.where(worse, start.codes, found.codes),
        scale=scale,
        zero_point=start.zero_point,
        scheme=scheme,
        shape=start.shape,
    )


class _Descent:
    """Everything is kept [columns, units]: the error D = weight - value, and the signed codes."""

    def __init__(self, rows: Tensor, start: QuantizedWeight, inputs: InputStatistics) -> None:
        self._start = start
        self._inputs = inputs
        self._grid = ColumnGrid(rows.shape[0], start.scale, start.zero_point, start.scheme)
        self._weight = rows.to(self._grid.compute).t().contiguous()
        self._error = (rows - start.dequantize()).to(self._grid.compute).t().contiguous()
        self._codes = (start.codes.t().to(torch.int16) - start.scheme.middle).to(self._grid.compute)
        self._code, self._value = torch.empty_like(self._weight[0]), torch.empty_like(self._weight[0])

    def run(self) -> QuantizedWeight:
        """The start with better codes and scales."""
        scheme = self._start.scheme
        blocks = [(at, gram.to(self._grid.compute)) for at, gram in self._inputs.blocks()]
        for _ in range(SWEEPS):
            for group, parts in enumerate(self._groups()):
                pieces = [piece for at, gram in blocks for piece in _overlap(parts, at, gram)]
                for columns, at, gram in pieces:
                    self._recode(columns, at, gram)
                if scheme.strategy != "tensor":
                    self._rescale(group, pieces)
        signed = self._codes.t().to(torch.int16)
        return QuantizedWeight(
            codes=(signed + scheme.middle).to(torch.uint8),
            scale=self._start.scale if scheme.strategy == "tensor" else self._grid.scales(),
            zero_point=self._start.zero_point,
            scheme=scheme,
            shape=self._start.shape,
        )

    def _groups(self) -> Iterator[slice]:
        columns = self._weight.shape[0]
        size = self._start.group_size or columns
        for first in range(0, columns, size):
            yield slice(first, min(first + size, columns))

    def _recode(self, columns: slice, at: slice, gram: Tensor) -> None:
        """Best codes of some columns, one after the other; `gram` is that of the columns `at`."""
        for first in range(columns.start, columns.stop, _BLOCK):
            last = min(first + _BLOCK, columns.stop)
            mine = gram[first - at.start : last - at.start]
            pull = mine @ self._error[at]  # [columns, units]
            inner = mine[:, first - at.start : last - at.start].contiguous()
            for index, curvature in enumerate(inner.diagonal().tolist()):
                if curvature <= 0:
                    continue  # nothing was ever read there
                column = first + index
                error = self._error[column]
                # The lowest point of the parabola: the value now, moved by what the other columns pull.
                target = (self._weight[column] - error).add_(pull[index], alpha=1 / curvature)
                target.masked_fill_(self._weight[column] == 0, 0)  # a pruned weight stays away
                self._grid.nearest(target, column, self._code, self._value)
                moved = torch.sub(self._weight[column], self._value).sub_(error)
                error.add_(moved)
                self._codes[column] = self._code
                if index + 1 < len(inner):
                    pull[index + 1 :].addr_(inner[index, index + 1 :], moved)

    def _rescale(self, group: int, pieces: list[tuple[slice, slice, Tensor]]) -> None:
        """The best scale of a group for its codes."""
        slope = torch.zeros_like(self._weight[0])
        curvature = torch.zeros_like(slope)
        steps = [self._grid.meaning(self._codes[columns], group) for columns, _, _ in pieces]
        for step, (columns, at, gram) in zip(steps, pieces, strict=True):
            inside = slice(columns.start - at.start, columns.stop - at.start)
            slope += (step * (gram[inside] @ self._error[at])).sum(0)
            curvature += (step * (gram[inside, inside] @ step)).sum(0)
        old = self._grid.scale(group)
        new = self._grid.stored(old + torch.where(curvature > 0, slope / curvature, 0))
        change = new - old
        better = (new > 0) & new.isfinite() & (change * (change * curvature - 2 * slope) < 0)
        self._grid.set_scale(group, torch.where(better, new, old))
        for step, (columns, _, _) in zip(steps, pieces, strict=True):
            value = self._grid.stored(step.mul_(self._grid.scale(group)))
            torch.sub(self._weight[columns], value, out=self._error[columns])


def _overlap(columns: slice, at: slice, gram: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """What of the `columns` lies in a block of the Gram matrix, with the block."""
    first, last = max(columns.start, at.start), min(columns.stop, at.stop)
    if first < last:
        yield slice(first, last), at, gram


METHOD = QuantizeMethod(
    name="coordinate_descent",
    quantize=coordinate_descent,
    paper="Behdin et al. 2023, QuantEase, arXiv:2309.01885, with the scales as further coordinates",
    summary="From GPTQ's codes on, the best code and scale one by one; least error of the outputs, slower; needs "
    "calibration data.",
    needs_inputs=True,
)
