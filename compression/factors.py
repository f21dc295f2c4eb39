"""Cholesky factors of large Gram matrices in the memory of one: what solvers of a layer's columns stand on.

All of it works on one square tensor in place: of rows of 14,336 entries each copy would take 0.8 GB.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_STRIP = 256  # rows that are moved, or inverted, at a time


def damped_factor(
    gram: Tensor,
    order: Tensor,
    dampings: Iterable[float],
    dtype: torch.dtype,
    dead: Tensor | None = None,
) -> Tensor | None:
    """The lower Cholesky factor L [n, n] of `gram` [n, n] with rows and columns in `order` [n], and damping.

    Where `dead` [n] is true the diagonal counts as 1.

    `dampings` are tried in turn until the matrix is positive definite to the accuracy of `dtype`; None if none does.
    Above the diagonal are zeros. `gram` stays as it is.
    """
    found = torch.empty(gram.shape, dtype=dtype)
    info = torch.empty((), dtype=torch.int32)
    for damping in dampings:
        for start in range(0, len(order), _STRIP):
            rows = gram.index_select(0, order[start : start + _STRIP])
            found[start : start + _STRIP] = rows.index_select(1, order)
        if dead is not None:
            found.diagonal().masked_fill_(dead[order], 1)
        found.diagonal().add_(damping)
        # LAPACK looks at columns: seen from there the lower factor by rows is the upper one.
        columns = found.t()
        torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
        if int(info) == 0:
            return found
    return None


def turn_around(matrix: Tensor) -> None:
    """Rows and columns of `matrix` [n, n] in the opposite order, in place."""
    size = len(matrix)
    for start in range(0, size // 2, _STRIP):
        stop = min(start + _STRIP, size // 2)
        top, bottom = matrix[start:stop], matrix[size - stop : size - start]
        kept = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(kept)
    if size % 2:
        middle = matrix[size // 2]
        middle.copy_(middle.flip(0))


def invert_upper(matrix: Tensor) -> None:
    """An upper triangular `matrix` [n, n] becomes its inverse, in place."""
    size = len(matrix)
    for start in reversed(range(0, size, _STRIP)):
        stop = min(start + _STRIP, size)
        own = matrix[start:stop, start:stop]
        eye = torch.eye(stop - start, dtype=matrix.dtype)
        own.copy_(torch.linalg.solve_triangular(own, eye, upper=True))
        behind = matrix[start:stop, stop:]
        if behind.shape[1]:
            behind.copy_((own @ (behind @ matrix[stop:, stop:])).neg_())
