"""N:M sparsity: of every M neighbours in a row, the inputs of one output unit, the N largest stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleetpress.compression.errors import MethodError
from fleetpress.compression.sparsity.amount import parse, reason_against_pattern
from fleetpress.compression.sparsity.magnitudes import (
    MAGNITUDE_BITS,
    TILE_ELEMENTS,
    integers,
    negative,
    reason_against_dtype,
    tiles,
)
from fleetpress.compression.sparsity.method import Options, SparsityMethod, Zeroing

if TYPE_CHECKING:
    from torch import Tensor


def _check(options: Options) -> None:
    if options.get("pattern") is None or options.get("sparsity") is not None:
        raise MethodError("magnitude_n_m takes a pattern such as 2:4, and no sparsity")
    parse(options["pattern"])


def _reason_against(options: Options, dtype: str, shape: Sequence[int]) -> str | None:
    return reason_against_pattern(options, shape) or reason_against_dtype(dtype)


def _zeroed(options: Options, shape: Sequence[int]) -> int:
    kept, group = parse(options["pattern"])
    return math.prod(shape) // group * (group - kept)


def _start(options: Options, dtype: str, shape: Sequence[int]) -> Zeroing:
    reason = _reason_against(options, dtype, shape)
    if reason is not None:
        raise MethodError(f"{reason}; add the layer to `ignore`")
    kept, group = parse(options["pattern"])
    return _Groups(group - kept, group, (1 << MAGNITUDE_BITS[dtype]) - 1)


class _Groups:
    """Zeroes the `going` smallest of every `group` neighbours, the first of them among equals."""

    def __init__(self, going: int, group: int, magnitude: int) -> None:
        self._going, self._group, self._magnitude = going, group, magnitude

    def measure(self, rows: Tensor) -> None:
        """See Zeroing: groups need not be measured."""

    def end_pass(self) -> None:
        """See Zeroing."""

    def apply(self, rows: Tensor) -> Tensor:
        """See Zeroing."""
        bits = integers(rows)
        buffers = bits.new_empty(3, min(bits.numel(), TILE_ELEMENTS))
        for tile in tiles(bits, self._group):
            places, rank, before = (
                buffer[: tile.numel()].view(self._group, -1) for buffer in buffers.unbind()
            )
            groups = tile.view(-1, self._group).T
            # A place of the group is a row here: few long rows are fast to compute with, many short ones are not.
            for place in range(self._group):
                places[place] = groups[place]
            kept = self._kept(places.bitwise_and_(self._magnitude), rank, before)
            for place in range(self._group):
                groups[place].bitwise_and_(kept[place])
        return rows

    def _kept(self, places: Tensor, rank: Tensor, before: Tensor) -> Tensor:
        """All bits set for what is kept, none for what goes, in `rank`; all are [group, groups of a tile]."""
        for later in range(self._group):
            rank[later] = later  # how many of the group go before this one, if no later one is smaller
        for later in range(1, self._group):
            earlier = before[:later]
            earlier.copy_(places[later]).sub_(places[:later])
            rank[:later] -= negative(earlier)  # -1 where the later one is smaller
            rank[later] += earlier.sum(0, dtype=rank.dtype)
        return negative(rank.neg_().add_(self._going - 1))


METHOD = SparsityMethod(
    name="magnitude_n_m",
    summary="zeroes the smallest weights of every M neighbours in a row, keeps N (pattern 2:4); needs no data",
    paper="Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378 (2:4 by magnitude); "
    "Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv:2102.04010",
    takes=("pattern",),
    check=_check,
    reason_against=_reason_against,
    passes=lambda options, dtype: 0,
    zeroed=_zeroed,
    start=_start,
)
