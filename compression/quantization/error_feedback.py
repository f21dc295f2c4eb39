"""GPTQ's solver: column after column is rounded, and what that costs is made good by the columns still to come.

With H = G + damping = (F + I) diag(d) (F + I)^T, F strictly upper triangular, the best value of column k given those
before it is w_k + sum_j<k (w_j - q_j) F_jk. This is GPTQ written with one factorization of H in place of an inverse
and two (LDLQ; Chee et al. 2023, arXiv:2307.13304, theorem 6, shows that the codes are the same).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.factors import damped_factor, turn_around
from fleetpress.compression.quantization import affine
from fleetpress.compression.quantization.column_grid import ColumnGrid
from fleetpress.compression.quantization.output_error import output_squares
from fleetpress.compression.quantization.range_search import best_scales
from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.compression.scheme import QuantScheme

DAMPING = 0.01  # share of the mean diagonal that is added to it, as in the paper
FEW_BITS = 3  # up to here a narrowed range is not always the better one
_BLOCK, _STRIP = (
    128,
    16,
)  # columns that are corrected by one product; the inner one stays in the cache (measured)


def compensated(
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: QuantScheme,
    inputs: InputStatistics,
    *,
    damping: float = DAMPING,
    ordered: bool = True,
) -> QuantizedWeight:
    """`rows` [units, columns] under the given scales and zero points, rounded with error feedback.

    Columns are taken in the order of their mean squares, largest first (act-order), unless `ordered` is false. Scales
    stay where they are, so the codes need no order of groups. Columns whose inputs were always zero are rounded to the
    nearest; weights that are zero stay zero. A Gram matrix that is no positive definite one gets ten times the damping,
    as often as needed.
    """
    ranges = [(scale, zero_point)]
    return _compensated(rows, ranges, scheme, inputs, damping=damping, ordered=ordered)[0]


def _compensated(
    rows: Tensor,
    ranges: Sequence[tuple[Tensor, Tensor | None]],
    scheme: QuantScheme,
    inputs: InputStatistics,
    *,
    damping: float = DAMPING,
    ordered: bool = True,
) -> list[QuantizedWeight]:
    """As `compensated` under several scales and zero points, for which the products are factored once."""
    grids = [ColumnGrid(rows.shape[0], scale, zero_point, scheme) for scale, zero_point in ranges]
    codes = [torch.empty(rows.shape, dtype=torch.uint8) for _ in grids]
    compute = grids[0].compute
    for at, gram in inputs.blocks():
        order = columns_in_order(gram, ordered=ordered)
        feedback = feedback_matrix(gram, damping, order, compute)
        weight = rows[:, at].to(compute).t().contiguous().index_select(0, order)
        for grid, mine in zip(grids, codes, strict=True):
            signed = _rounded(weight, feedback, grid, order + at.start)
            given = torch.empty_like(signed)
            given[order] = signed
            mine[:, at] = given.t().view(torch.uint8).add(scheme.middle)
    return [
        QuantizedWeight(
            codes=mine, scale=scale, zero_point=zero_point, scheme=scheme, shape=tuple(rows.shape)
        )
        for mine, (scale, zero_point) in zip(codes, ranges, strict=True)
    ]


def compensated_in_the_better_range(
    rows: Tensor, scheme: QuantScheme, inputs: InputStatistics
) -> QuantizedWeight:
    """As `compensated`, with the ranges of `smallest_error`; of few bits every unit takes the full one where that is
    better.

    Ranges are narrowed for the weights' sake, but what counts are outputs, whose errors are made good on the way: at 2
    bits a third of the units of a language model of characters were better off with the full range, and the errors of
    outputs fell by a tenth; at 4 bits by a hundredth, not worth the second solving.
    Raises QuantizationError for bad values.
    """
    ranges = [best_scales(rows, scheme)]
    if scheme.num_bits > FEW_BITS:
        return _compensated(rows, ranges, scheme, inputs)[0]
    narrow, full = _compensated(rows, [*ranges, affine.quantization_parameters(rows, scheme)], scheme, inputs)
    errors = [output_squares(item.dequantize() - rows, inputs) for item in (narrow, full)]
    if scheme.strategy == "tensor":  # one scale for all of them
        return full if errors[1].sum() < errors[0].sum() else narrow
    better = (errors[1] < errors[0]).unsqueeze(1)
    # A narrowed range has the zero point of the full one.
    return replace(
        narrow,
        codes=torch.where(better, full.codes, narrow.codes),
        scale=torch.where(better, full.scale, narrow.scale),
    )


def columns_in_order(gram: Tensor, *, ordered: bool = True) -> Tensor:
    """Columns of a block by their sum of squares, largest first; as they are unless `ordered`."""
    if not ordered:
        return torch.arange(gram.shape[0])
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def feedback_matrix(
    gram: Tensor, damping: float, order: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """F + I [n, n] of the damped `gram` [n, n]: unit upper triangular, the share of column j's error that k takes.

    With `order` [n] that of the columns in this order, computed in `dtype`. Takes the memory of one matrix.
    """
    mean = float(gram.diagonal().mean())
    dtype = dtype or gram.dtype
    if not mean > 0:
        return torch.eye(gram.shape[0], dtype=dtype)  # nothing was ever read there: no error matters
    backwards = (torch.arange(gram.shape[0]) if order is None else order).flip(0)
    factor = damped_factor(gram, backwards, (share * mean for share in _growing(damping)), dtype)
    assert factor is not None, "a matrix whose diagonal outweighs the rest of every row is positive definite"
    turn_around(factor)
    return factor.div_(factor.diagonal().clone())


def _growing(damping: float) -> Iterator[float]:
    for power in range(12):
        yield max(damping, 1e-6) * 10.0**power


def _rounded(weight: Tensor, feedback: Tensor, grid: ColumnGrid, columns: Tensor) -> Tensor:
    """Signed codes int8 [columns, units] of `weight` [columns, units], whose i-th row is column `columns[i]`."""
    count, units = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8)
    errors = torch.empty_like(weight)
    targets = torch.empty(min(_BLOCK, count), units, dtype=weight.dtype)
    code, value = torch.empty(units, dtype=weight.dtype), torch.empty(units, dtype=weight.dtype)
    places = columns.tolist()
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        block = targets[: stop - start]
        torch.addmm(weight[start:stop], feedback[:start, start:stop].t(), errors[:start], out=block)
        for first in range(start, stop, _STRIP):
            last = min(first + _STRIP, stop)
            for index in range(first, last):
                target = block[index - start]
                target.masked_fill_(weight[index] == 0, 0)  # a pruned weight stays away
                grid.nearest(target, places[index], code, value)
                codes[index] = code
                torch.sub(weight[index], value, out=errors[index])
                if index + 1 < last:
                    block[index + 1 - start : last - start].addr_(
                        feedback[index, index + 1 : last], errors[index]
                    )
            if last < stop:
                block[last - start :].addmm_(feedback[first:last, last:stop].t(), errors[first:last])
    return codes
