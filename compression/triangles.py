"""Symmetric matrices kept as strips of their upper triangles: little more than half of the numbers.

A strip is some rows from their own square on the diagonal to the end; strips lie one after the other in a flat tensor.
Below the diagonal within that square anything may stand: only the upper triangle counts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_STRIP = 256  # rows that are multiplied with themselves and those behind them at a time,
_NARROW_STRIP, _NARROW = 128, 1024  # so many in matrices of up to so many columns (measured)


def places(size: int) -> Iterator[tuple[slice, slice]]:
    """Of a matrix [size, size]: the rows of each strip, and where they lie in the flat tensor."""
    step, begin = (_STRIP if size > _NARROW else _NARROW_STRIP), 0
    for first in range(0, size, step):
        last = min(first + step, size)
        end = begin + (last - first) * (size - first)
        yield slice(first, last), slice(begin, end)
        begin = end


def packed_length(size: int) -> int:
    """Numbers that a matrix [size, size] is kept as."""
    *_, (_, last) = places(size)
    length: int = last.stop
    return length


def strips(packed: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views of a flat tensor [packed_length(size)]: the rows, and their entries [rows, size - first row]."""
    for rows, place in places(size):
        yield rows, packed[place].view(rows.stop - rows.start, size - rows.start)


def add_products(packed: Tensor, columns: Tensor) -> None:
    """Add C C^T to a packed matrix in place, C = `columns` [n, rows]: little more than half of the operations."""
    for rows, strip in strips(packed, columns.shape[0]):
        strip.addmm_(columns[rows], columns[rows.start :].t())


def add_to_upper(matrix: Tensor, packed: Tensor) -> None:
    """Add a packed matrix to the upper triangle of `matrix` [n, n] in place; `mirror_upper` comes in the end."""
    for rows, strip in strips(packed, matrix.shape[0]):
        matrix[rows, rows.start :].add_(strip)


def mirror_upper(matrix: Tensor) -> None:
    """Write the upper triangle of `matrix` [n, n] over the lower one, in place."""
    for start in range(0, matrix.shape[0], _STRIP):
        stop = start + _STRIP
        own = matrix[start:stop, start:stop]
        own.copy_(own.triu().add_(own.triu(1).t()))
        matrix[stop:, start:stop].copy_(matrix[start:stop, stop:].t())


def packed_upper(matrices: Tensor) -> Tensor:
    """Symmetric matrices [..., n, n] as flat tensors [..., packed_length(n)]."""
    size = matrices.shape[-1]
    found = matrices.new_empty(*matrices.shape[:-2], packed_length(size))
    for one, matrix in zip(found.view(-1, found.shape[-1]), matrices.view(-1, size, size), strict=True):
        for rows, strip in strips(one, size):
            strip.copy_(matrix[rows, rows.start :])
    return found


def diagonals(packed: Tensor, size: int) -> Tensor:
    """The diagonals [..., size] of packed matrices [..., packed_length(size)]."""
    steps = [
        torch.arange(rows.stop - rows.start, device=packed.device) * (size - rows.start + 1) + place.start
        for rows, place in places(size)
    ]
    return packed[..., torch.cat(steps)]
