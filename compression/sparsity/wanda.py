"""Wanda: a weight counts by what it adds to the output, its magnitude times the norm of what it is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleetpress.compression.sparsity.amount import (
    check_either,
    lowest,
    lowest_of_groups,
    reason_against_pattern,
    share_of,
    zeroed_of,
)
from fleetpress.compression.sparsity.magnitudes import reason_against_dtype
from fleetpress.compression.sparsity.method import Options, SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor

    from fleetpress.compression.calibration import InputStatistics


def _reason_against(options: Options, dtype: str, shape: Sequence[int]) -> str | None:
    return reason_against_pattern(options, shape) or reason_against_dtype(dtype)


def zero_rows(rows: Tensor, options: Options, inputs: InputStatistics) -> Tensor:
    """Zeroes the lowest |w_ij| * ||x_j||_2 of every row i, the first of them among equals."""
    scores = rows.abs().double() * inputs.squares.sqrt()
    if options.get("pattern") is not None:
        going = lowest_of_groups(scores, options["pattern"])
    else:
        going = lowest(scores, share_of(options["sparsity"], rows.shape[1]))
    return rows.masked_fill(going, 0)


METHOD = SparsityMethod(
    name="wanda",
    summary="zeroes of every output unit the weights that are smallest times the norm of their inputs",
    paper="Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695",
    takes=("sparsity", "pattern"),
    check=check_either,
    reason_against=_reason_against,
    zeroed=zeroed_of,
    zero_rows=zero_rows,
)
