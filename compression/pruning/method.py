"""What a pruning method is: a table entry that gives every unit of a group a score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fleetpress.compression.layers import Layer
from fleetpress.compression.pruning.units import UnitGroup


class GradientStatistics(Protocol):
    """Gradients of a layer's units over many mini-batches; every field has one entry per output unit."""

    @property
    def mean_square(self) -> Tensor:
        """Mean over the unit's entries of the squared mean gradient."""

    @property
    def variance(self) -> Tensor:
        """Mean over the unit's entries of the gradient's variance."""

    @property
    def entries(self) -> Tensor:
        """Number of the unit's entries: weights and bias."""


@dataclass(frozen=True, kw_only=True)
class ScoreContext:
    """What a score may look at: stored tensors by name, layers by name, gradient statistics by layer, the seed."""

    values: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    statistics: Mapping[str, GradientStatistics]
    seed: int


Score = Callable[[ScoreContext, UnitGroup], Tensor]


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """`score` gives one float64 per unit of a group, low = unimportant.

    `spread`, where a method has it, gives the pair that `mean_threshold` and `std_threshold` are compared with.
    """

    name: str
    summary: str
    paper: str
    score: Score
    needs_gradients: bool = False
    spread: Callable[[ScoreContext, UnitGroup], tuple[Tensor, Tensor]] | None = None


def pooled(group: UnitGroup, squares: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Tensor:
    """Root mean square over all entries of a unit's member rows, whatever layers they lie in.

    `squares[layer]` and `entries[layer]` hold sums of squares and counts, one per output unit of the layer.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    count = torch.zeros(group.count, dtype=torch.float64)
    for layer, spots in group.members.items():
        mine = torch.from_numpy(spots)
        inside = mine >= 0
        total.index_add_(0, mine[inside], squares[layer].to(torch.float64)[inside])
        count.index_add_(0, mine[inside], entries[layer].to(torch.float64)[inside])
    return (total / count).sqrt()
