"""SparseGPT: weights go where that costs the outputs least, and those that stay make up for it, column by column.

With H = sum of x x^T over the inputs and U the upper Cholesky factor of its inverse, weight w_ij costs w_ij^2 / U_jj^2;
zeroing it moves the row's later weights by -(w_ij / U_jj) * U_j,j+1..: the best answer with the earlier ones fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleetpress.compression.errors import MethodError
from fleetpress.compression.sparsity.amount import (
    check_either,
    lowest,
    lowest_of_groups,
    parse,
    reason_against_pattern,
    share_of,
    zeroed_of,
)
from fleetpress.compression.sparsity.magnitudes import reason_against_dtype
from fleetpress.compression.sparsity.method import Options, SparsityMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fleetpress.compression.calibration import InputStatistics

BLOCK_COLUMNS = 128  # chosen and updated together; the paper's
DAMPING = 0.01  # added to the diagonal, as a share of its mean; the paper's
_PRODUCTS_COLUMNS = 512  # very long rows may have products in blocks of a multiple: `LEAST_BLOCK_COLUMNS`
_WHOLE_COLUMNS = 4096  # the others: `calibration.NARROW_COLUMNS`


def _reason_against(options: Options, dtype: str, shape: Sequence[int]) -> str | None:
    reason = reason_against_pattern(options, shape) or reason_against_dtype(dtype)
    pattern = options.get("pattern")
    if reason is None and pattern and shape[-1] > _WHOLE_COLUMNS and _PRODUCTS_COLUMNS % parse(pattern)[1]:
        return (
            f"rows of {shape[-1]} may be worked on in blocks of {_PRODUCTS_COLUMNS}, which groups of "
            f"{parse(pattern)[1]} do not divide (pattern {pattern})"
        )
    return reason


def zero_rows(rows: Tensor, options: Options, inputs: InputStatistics) -> Tensor:
    """The rows with a share of every block of 128 columns zeroed, or M - N of every M neighbours, and the rest moved.

    Shares add up to that of the whole weight. Columns whose inputs are always zero go first and move nothing. Rows
    for which products of inputs are known only within blocks are worked on block by block.
    """
    import torch

    # Measured up to 6,144 columns, also of fewer inputs than columns: in doubles no digit of the error changes.
    dtype = torch.promote_types(rows.dtype, torch.float32)
    result = torch.empty_like(rows)
    done = 0
    for columns, gram in inputs.blocks():
        part = rows[:, columns].to(dtype, copy=True).contiguous()
        pruned = _Columns(part, gram, options, rows.shape[0] * columns.start, done)
        pruned.run()
        result[:, columns] = part.to(rows.dtype)
        done = pruned.gone
    return result


class _Columns:
    """Zeroes and updates `weight` [rows, columns] in place; `gone` have been zeroed in all so far."""

    def __init__(self, weight: Tensor, gram: Tensor, options: Options, before: int, gone: int) -> None:
        self._weight, self._options = weight, options
        self._before, self.gone = before, gone  # entries, and zeros among them, in the columns before these
        self._dead = gram.diagonal() == 0
        self._factor = _factor(gram, weight.dtype)

    def run(self) -> None:
        """Column after column."""
        import torch

        pattern = self._options.get("pattern")
        group = 1 if pattern is None else parse(pattern)[1]
        size = max(BLOCK_COLUMNS // group, 1) * group
        for start in range(0, self._weight.shape[1], size):
            stop = min(start + size, self._weight.shape[1])
            block, factor = self._weight[:, start:stop], self._factor[start:stop, start:stop]
            going = torch.zeros_like(block, dtype=torch.bool)
            if pattern is None:
                going = self._share(start, stop)
            errors = torch.zeros_like(block)
            for column in range(stop - start):
                if pattern is not None and column % group == 0:
                    # Only now: the columns before have moved these.
                    at = slice(column, column + group)
                    going[:, at] = lowest_of_groups(
                        self._costs(start + column, start + column + group), pattern
                    )
                values = block[:, column]
                error = torch.where(going[:, column], values, 0) / factor[column, column]
                block[:, column] = values.masked_fill(going[:, column], 0)
                block[:, column + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 :]
                errors[:, column] = error
            self._weight[:, stop:] -= errors @ self._factor[start:stop, stop:]

    def _share(self, start: int, stop: int) -> Tensor:
        """The cheapest of a block, as many as bring the zeros so far to the share of all entries so far."""
        costs = self._costs(start, stop)
        until = self._before + self._weight.shape[0] * stop
        count = share_of(self._options["sparsity"], until) - self.gone
        self.gone += count
        return lowest(costs.reshape(1, -1), count).view(costs.shape)

    def _costs(self, start: int, stop: int) -> Tensor:
        at = slice(start, stop)
        costs = self._weight[:, at].square() / self._factor.diagonal()[at].square()
        return costs.masked_fill(self._dead[at], 0)


def _factor(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped `gram` [n, n], in the memory of one matrix.

    One that cannot be inverted gets ten times the damping, as often as needed. Raises MethodError for NaN.
    """
    import torch

    from fleetpress.compression.factors import damped_factor, invert_upper, turn_around

    dead = gram.diagonal() == 0
    mean = float(torch.where(dead, 1, gram.diagonal().double()).mean())
    dampings = (DAMPING * 10.0**power * mean for power in range(12))
    backwards = torch.arange(gram.shape[0]).flip(0)
    factor = damped_factor(gram, backwards, dampings, dtype, dead)
    if factor is not None:
        turn_around(factor)  # H = R R^T with R upper, so the inverse is U^T U with U = R^-1
        invert_upper(factor)
        return factor
    raise MethodError(
        "the products of the layer's inputs are no numbers; look for NaN in the data and the weights"
    )


METHOD = SparsityMethod(
    name="sparsegpt",
    summary="zeroes weights where that changes the layer's outputs least, and moves the others to make up for it",
    paper="Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, "
    "arXiv:2301.00774",
    takes=("sparsity", "pattern"),
    check=check_either,
    reason_against=_reason_against,
    zeroed=zeroed_of,
    zero_rows=zero_rows,
    moves_weights=True,
)
