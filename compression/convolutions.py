"""The options of a convolution in a graph, dim by dim."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from fleetpress.compression.arguments import arguments


def each(value: Any, dims: int) -> tuple[int, ...]:
    """An option dim by dim: one number may stand for all."""
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return sizes * dims if len(sizes) == 1 else sizes


def sides(node: fx.Node, kernel: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Zeros that a convolution with a `kernel` of these sizes adds before and after each of its dims."""
    told, dims = arguments(node), len(kernel)
    if told["padding"] == "valid":
        return ((0, 0),) * dims
    if told["padding"] == "same":
        reach = [(size - 1) * step for size, step in zip(kernel, each(told["dilation"], dims), strict=True)]
        return tuple((far // 2, far - far // 2) for far in reach)
    return tuple((side, side) for side in each(told["padding"], dims))
