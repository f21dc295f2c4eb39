"""Tiles: runs of a tensor's rows that are treated at a time, always the same ones, whatever was read at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fleetpress.compression.errors import NotFiniteError

_EXPONENTS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)} | {
    "F64": (np.uint64, 0x7FF0000000000000)
}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a tensor is cut: `rows` of `row_bytes`, `tile_rows` at a time; `whole` if it must not be cut at all.

    `passes` times all its rows are read before they are converted.
    """

    rows: int
    row_bytes: int
    tile_rows: int
    passes: int = 0
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What became of a tile: one run of bytes for each stored tensor, in their order, and sums of squares.

    `signal` is that of the weights, `noise` that of what they lost; both 0 for what is not changed.
    """

    parts: tuple[memoryview, ...]
    signal: float = 0.0
    noise: float = 0.0


def tiles(view: memoryview, cut: Geometry) -> Iterator[memoryview]:
    """The tiles of a block of whole tiles (the last one of a tensor may be shorter)."""
    step = cut.tile_rows * cut.row_bytes
    for start in range(0, len(view), step):
        yield view[start : start + step]


def check_finite(name: str, dtype: str, rows: memoryview) -> None:
    """Raises NotFiniteError with the tensor's name if floating-point values are NaN or infinite."""
    if dtype not in _EXPONENTS:
        return
    kind, exponent = _EXPONENTS[dtype]
    exponents = np.frombuffer(rows, dtype=kind) & kind(exponent)
    if exponents.size and exponents.max() == exponent:
        bad = np.frombuffer(rows, dtype=kind)[exponents == exponent]
        what = "NaN" if (bad & kind((exponent & -exponent) - 1)).any() else "infinite"
        raise NotFiniteError(
            f"{name} holds {what} values ({bad.size} of the {exponents.size} in one block are not finite); "
            "take the last good state of the model"
        )


def shape_bytes(shape: Sequence[int]) -> bytes:
    """A `weight_shape` as it is stored."""
    return np.array(shape, dtype="<i8").tobytes()
