"""Treatments done to a tensor block by block of rows, so that no tensor needs to be in memory as a whole.

Blocks come in order and consist of whole tiles: a tile is a fixed number of rows that depends on the tensor's shape
alone. Errors are summed and rows are packed tile by tile, so the size of the blocks never changes a bit of the result.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from fleetpress.compression import kernels
from fleetpress.compression.checkpoint.tiles import Geometry, Tile, check_finite, shape_bytes
from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.sparsity import measuring_passes
from fleetpress.compression.treatment import (
    ITEM_BYTES,
    ROWS_PER_WORD,
    SCALE,
    SHAPE,
    ZERO_POINT,
    Treatment,
    stored,
)

TILE_ELEMENTS = 1 << 19  # what a tile's conversion touches stays in a core's cache


def geometry(dtype: str, shape: Sequence[int], size_bytes: int, treatment: Treatment) -> Geometry:
    """The cut of a tensor: by its matrix rows if it is quantized or zeroed, else by entries or bytes."""
    scheme = treatment.scheme
    if scheme is None and not treatment.sparsity:
        item = ITEM_BYTES.get(dtype, 1) if treatment.cast else 1
        return Geometry(rows=size_bytes // item, row_bytes=item, tile_rows=TILE_ELEMENTS)
    rows, columns = shape[0], math.prod(shape[1:])
    if treatment.calibrated:
        return Geometry(rows=rows, row_bytes=size_bytes // max(1, rows), tile_rows=max(1, rows), whole=True)
    tile = max(1, TILE_ELEMENTS // max(1, columns) // ROWS_PER_WORD) * ROWS_PER_WORD
    passes = measuring_passes(dict(treatment.sparsity), dtype) if treatment.sparsity else 0
    whole = False
    if scheme is not None and scheme.strategy == "tensor":
        whole = treatment.method != "round_to_nearest"  # it tries ranges on all weights at once
        passes += not whole
    return Geometry(
        rows=rows,
        row_bytes=size_bytes // max(1, rows),
        tile_rows=max(rows, 1) if whole else tile,
        passes=passes,
        whole=whole,
    )


class Converter(Protocol):
    """One tensor's treatment: first `passes` times `measure` over all tiles and `end_pass`, then `convert` over all."""

    def measure(self, rows: memoryview) -> None:
        """Looks at the next tile."""
        ...

    def end_pass(self) -> None:
        """Every tile has been seen."""
        ...

    def convert(self, rows: memoryview) -> Tile:
        """The next tile treated. Its bytes are valid until the next call. Raises NotFiniteError, QuantizationError."""
        ...

    def tail(self) -> tuple[bytes, ...]:
        """What follows the tiles in each stored tensor: parts that do not belong to rows."""
        ...


def converter(name: str, dtype: str, shape: Sequence[int], treatment: Treatment, *, check: bool) -> Converter:
    """The converter of a tensor; with `check` NaN and infinity in it are an error."""
    shape = tuple(shape)
    if _is_copy(dtype, treatment):
        return _Copy(name, dtype, check=check)
    if not needs_torch(dtype, shape, treatment):
        return _Compiled(name, dtype, shape, treatment)
    from fleetpress.compression.checkpoint.torch_rows import TorchRows

    return TorchRows(name, dtype, shape, treatment, check=check)


def needs_torch(dtype: str, shape: Sequence[int], treatment: Treatment) -> bool:
    """Whether the treatment is done in torch: it is more than a copy, and the compiled kernel does not know it.

    What is calibrated was done before, by another task.
    """
    scheme = treatment.scheme
    if _is_copy(dtype, treatment) or treatment.calibrated:
        return False
    plain = not treatment.sparsity and treatment.method == "round_to_nearest"
    return not (plain and scheme is not None and kernels.supports(dtype, scheme, tuple(shape)))


def _is_copy(dtype: str, treatment: Treatment) -> bool:
    return treatment.scheme is None and not treatment.sparsity and treatment.cast in (None, dtype)


class _Copy:
    """Bytes as they are."""

    def __init__(self, name: str, dtype: str, *, check: bool) -> None:
        self._name, self._dtype, self._check = name, dtype, check

    def measure(self, rows: memoryview) -> None:
        raise AssertionError("a copy needs no pass")

    def end_pass(self) -> None:
        raise AssertionError("no pass was asked for")

    def convert(self, rows: memoryview) -> Tile:
        if self._check:
            check_finite(self._name, self._dtype, rows)
        return Tile(parts=(rows,))

    def tail(self) -> tuple[bytes, ...]:
        return (b"",)


class _Compiled:
    """Round to nearest in the compiled kernel."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], treatment: Treatment) -> None:
        assert treatment.scheme is not None
        self._name, self._dtype, self._shape = name, dtype, shape
        self._scheme, self._layout = treatment.scheme, treatment.layout
        parts = stored(name, dtype, shape, treatment)
        self._suffixes = [part.name.removeprefix(name) for part in parts]

    def measure(self, rows: memoryview) -> None:
        raise AssertionError("groups and channels need no pass")

    def end_pass(self) -> None:
        raise AssertionError("no pass was asked for")

    def convert(self, rows: memoryview) -> Tile:
        columns = self._shape[1]
        count = len(rows) // (columns * ITEM_BYTES[self._dtype])
        try:
            made = kernels.quantize_rows(
                rows, self._dtype, (count, columns), self._scheme, layout=self._layout
            )
        except QuantizationError as error:
            check_finite(self._name, self._dtype, rows)
            raise QuantizationError(f"{self._name}: {error}") from None
        sides = {SCALE: made.scale, ZERO_POINT: made.zero_point}
        parts = [made.packed.data]
        for suffix in self._suffixes[1:]:
            part = sides.get(suffix)
            parts.append(memoryview(b"") if part is None else part.data)
        return Tile(parts=tuple(parts), signal=made.signal, noise=made.noise)

    def tail(self) -> tuple[bytes, ...]:
        return tuple(shape_bytes(self._shape) if suffix == SHAPE else b"" for suffix in self._suffixes)
