"""How many weights go: a share of them (`sparsity`), or all but N of every M neighbours in a row (`pattern` N:M)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from fleetpress.compression.errors import MethodError
from fleetpress.compression.sparsity.method import Options

if TYPE_CHECKING:
    from torch import Tensor

_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")
_MOST = 32  # neighbours; hardware knows 4, and the work per weight grows with it


def parse(pattern: str) -> tuple[int, int]:
    """N and M of a pattern such as `2:4`. Raises MethodError unless 1 <= N < M <= 32."""
    match = _PATTERN.fullmatch(pattern)
    if match is None or not int(match[1]) < int(match[2]) <= _MOST:
        raise MethodError(f"{pattern!r} is no pattern N:M with 1 <= N < M <= {_MOST}, such as 2:4")
    return int(match[1]), int(match[2])


def share_of(sparsity: float, count: int) -> int:
    """How many of `count` a share means, as it is written: 0.29 of 100 are 29, although the floats give less."""
    return math.floor(Fraction(repr(float(sparsity))) * count)


def zeroed_of(options: Options, shape: Sequence[int]) -> int:
    """How many entries of a weight a `pattern`, or a share of every row, makes zero.

    At least: a method that works on the groups of a convolution counts its share group by group.
    """
    if options.get("pattern") is not None:
        kept, group = parse(options["pattern"])
        return math.prod(shape) // group * (group - kept)
    return math.prod(shape[:-1]) * share_of(options["sparsity"], shape[-1])


def check_either(options: Options) -> None:
    """Raises MethodError unless the options of a method that takes both name one valid amount."""
    sparsity, pattern = options.get("sparsity"), options.get("pattern")
    if (sparsity is None) == (pattern is None):
        raise MethodError(
            f"{options.get('method')} takes either a sparsity such as 0.5, or a pattern such as 2:4"
        )
    if pattern is not None:
        parse(pattern)
    elif sparsity is not None and not 0 < sparsity < 1:
        raise MethodError(f"sparsity {sparsity} is not between 0 and 1")


def reason_against_pattern(options: Options, shape: Sequence[int]) -> str | None:
    """Why rows cannot be cut into the groups of a pattern, None if they can or no pattern is asked for."""
    pattern = options.get("pattern")
    if pattern is None or shape[-1] % parse(pattern)[1] == 0:
        return None
    return f"rows of {shape[-1]} do not divide into groups of {parse(pattern)[1]} (pattern {pattern})"


def lowest(scores: Tensor, count: int) -> Tensor:
    """Bool as `scores` [rows, columns]: the `count` lowest of every row, the first of them among equals."""
    import torch

    order = torch.sort(scores, dim=-1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def lowest_of_groups(scores: Tensor, pattern: str) -> Tensor:
    """As `lowest`, M - N of every M neighbours in a row."""
    kept, group = parse(pattern)
    return lowest(scores.reshape(-1, group), group - kept).view(scores.shape)
