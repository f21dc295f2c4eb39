"""Magnitudes of floating-point numbers as integers: without its sign bit, the bit pattern orders them.

Zero of either sign is the smallest; infinity is larger than every number, and NaN larger than that: both are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAGNITUDE_BITS = {"BF16": 15, "F16": 15, "F32": 31, "F64": 63}  # by safetensors' name of the dtype
TILE_ELEMENTS = 1 << 18  # what is computed of a tile stays in a core's cache


def reason_against_dtype(dtype: str) -> str | None:
    """Why weights of this dtype are left alone, None if they need not be."""
    if dtype in MAGNITUDE_BITS:
        return None
    return f"its dtype is {dtype}; only {', '.join(MAGNITUDE_BITS)} have magnitudes to compare"


def integers(rows: Tensor) -> Tensor:
    """The bits of contiguous `rows` as signed integers [entries], in the same memory."""
    import torch

    return rows.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.itemsize])


def tiles(bits: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Runs of entries that stay in the cache, whole multiples of `multiple` (the last one, too, if `bits` is)."""
    step = TILE_ELEMENTS // multiple * multiple
    for start in range(0, bits.numel(), step):
        yield bits[start : start + step]


def negative(differences: Tensor) -> Tensor:
    """In place: every bit of a negative number set (-1), every bit of another one clear (0)."""
    return differences.bitwise_right_shift_(8 * differences.itemsize - 1)
