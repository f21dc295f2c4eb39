"""Unstructured sparsity: the smallest weights of a tensor are zeroed, wherever they are.

The threshold between those that go and those that stay is found exactly, digit by digit of the magnitude's bits: every
measuring pass counts how often each value of a digit occurs, among the weights that share the digits found before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleetpress.compression.errors import MethodError
from fleetpress.compression.sparsity.amount import share_of
from fleetpress.compression.sparsity.magnitudes import (
    MAGNITUDE_BITS,
    integers,
    negative,
    reason_against_dtype,
    tiles,
)
from fleetpress.compression.sparsity.method import Options, SparsityMethod, Zeroing

if TYPE_CHECKING:
    from torch import Tensor

_DIGIT_BITS = 16  # 2^16 counters are half a megabyte


def _check(options: Options) -> None:
    sparsity = options.get("sparsity")
    if sparsity is None or options.get("pattern") is not None:
        raise MethodError("magnitude_unstructured takes a sparsity such as 0.5, and no pattern")
    if not 0 < sparsity < 1:
        raise MethodError(f"sparsity {sparsity} is not between 0 and 1")


def _reason_against(options: Options, dtype: str, shape: Sequence[int]) -> str | None:
    return reason_against_dtype(dtype)


def _passes(options: Options, dtype: str) -> int:
    return -(-MAGNITUDE_BITS[dtype] // _DIGIT_BITS)


def _zeroed(options: Options, shape: Sequence[int]) -> int:
    return share_of(options["sparsity"], math.prod(shape))


def _start(options: Options, dtype: str, shape: Sequence[int]) -> Zeroing:
    reason = reason_against_dtype(dtype)
    if reason is not None:
        raise MethodError(f"{reason}; add the layer to `ignore`")
    return _Smallest(_zeroed(options, shape), MAGNITUDE_BITS[dtype])


class _Smallest:
    """Zeroes the `count` smallest of all entries, the first of them among equals."""

    def __init__(self, count: int, bits: int) -> None:
        self._left = count  # of those that are not below the threshold, as far as it is known
        self._magnitude = (1 << bits) - 1
        self._threshold, self._unknown_bits = (
            0,
            bits,
        )  # the digits that are known, and how many bits follow them
        self._counts: Tensor | None = None

    def measure(self, rows: Tensor) -> None:
        """See Zeroing."""
        rest = self._rest_bits()
        values = 1 << (self._unknown_bits - rest)
        known = self._magnitude >> self._unknown_bits != 0
        for tile in tiles(integers(rows)):
            digits = tile & self._magnitude
            if known:  # what does not share the known digits is counted at either end, and left out
                digits.sub_(self._threshold << self._unknown_bits)
                digits.clamp_(-1 << rest, 1 << self._unknown_bits).bitwise_right_shift_(rest).add_(1)
                counts = digits.bincount(minlength=values + 2)[1:-1]
            else:
                counts = digits.bitwise_right_shift_(rest).bincount(minlength=values)
            self._counts = counts if self._counts is None else self._counts.add_(counts)

    def end_pass(self) -> None:
        """See Zeroing."""
        rest, digit = self._rest_bits(), 0
        if self._left and self._counts is not None:
            sums = self._counts.cumsum(0)
            digit = int((sums < self._left).sum())
            self._left -= int(sums[digit] - self._counts[digit])
        self._threshold = self._threshold << (self._unknown_bits - rest) | digit
        self._unknown_bits, self._counts = rest, None

    def _rest_bits(self) -> int:
        """How many bits follow the digit that is being counted."""
        return max(0, self._unknown_bits - _DIGIT_BITS)

    def apply(self, rows: Tensor) -> Tensor:
        """See Zeroing."""
        for tile in tiles(integers(rows)):
            magnitude = tile & self._magnitude
            last = self._threshold - 1  # the largest magnitude that goes
            if self._left:
                equal = magnitude == self._threshold
                count = int(equal.count_nonzero())
                if count <= self._left:
                    last += 1
                else:
                    tile[equal.nonzero()[: self._left, 0]] = 0
                self._left -= min(count, self._left)
            tile.bitwise_and_(negative(magnitude.neg_().add_(last)))
        return rows


METHOD = SparsityMethod(
    name="magnitude_unstructured",
    summary="zeroes the smallest weights of every tensor, a share of them (sparsity); needs no data",
    paper="Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks, arXiv:1506.02626",
    takes=("sparsity",),
    check=_check,
    reason_against=_reason_against,
    passes=_passes,
    zeroed=_zeroed,
    start=_start,
    compares_tensors=True,
)
