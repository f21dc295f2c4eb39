"""What a pruning method is: a table entry that gives every unit of a group a score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.errors import MethodError
from fleetpress.compression.program import aliases
from fleetpress.compression.pruning.units import UnitGroup
from fleetpress.compression.selection import Layer
from fleetpress.compression.statistics import NeuronStatistics


@dataclass(frozen=True, kw_only=True)
class ScoreContext:
    """What a score may look at: stored tensors by name, layers by name, gradient statistics by layer, the seed, and
    `inputs`: statistics of what a weight is multiplied with, by the weight's state name.
    """

    values: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    statistics: Mapping[str, NeuronStatistics]
    seed: int
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)

    def rows(self, group: UnitGroup) -> tuple[str, ...]:
        """The group's layers, of those that share a tied weight only the one that statistics were kept of."""
        tied = aliases(self.values)
        chosen: dict[str, str] = {}
        for name in group.layers:
            weight = self.layers[name].weights[0]
            owner = tied.get(weight, weight)
            if owner not in chosen or (chosen[owner] not in self.statistics and name in self.statistics):
                chosen[owner] = name
        return tuple(chosen.values())


Score = Callable[[ScoreContext, UnitGroup], Tensor]


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """`score` gives one float64 per unit of a group, low = unimportant.

    `needs_gradients` asks for gradient statistics, `needs_products` for those with the products of weights and
    gradients, `needs_inputs` for statistics of what the layers read. `spread`, where a method has it, gives the pair
    that `mean_threshold` and `std_threshold` are compared with.
    """

    name: str
    summary: str
    paper: str
    score: Score
    needs_gradients: bool = False
    needs_products: bool = False
    needs_inputs: bool = False
    spread: Callable[[ScoreContext, UnitGroup], tuple[Tensor, Tensor]] | None = None


def added(group: UnitGroup, values: Mapping[str, Tensor]) -> Tensor:
    """Sum of `values[layer]` [output units of the layer] over all member rows of every unit; float64."""
    total = torch.zeros(group.count, dtype=torch.float64)
    for layer, value in values.items():
        spots = torch.from_numpy(group.members[layer])
        inside = spots >= 0
        total.index_add_(0, spots[inside], value.to(torch.float64)[inside])
    return total


def collected(context: ScoreContext, group: UnitGroup, method: str) -> dict[str, NeuronStatistics]:
    """Gradient statistics of the group's layers. Raises MethodError, in the name of `method`, if some are missing."""
    names = context.rows(group)
    missing = [name for name in names if name not in context.statistics]
    if missing:
        raise MethodError(
            f"{method} needs the gradient statistics of {', '.join(missing)}; add `train` or `collect`"
        )
    return {name: context.statistics[name] for name in names}


def pooled(group: UnitGroup, squares: Mapping[str, Tensor], entries: Mapping[str, int]) -> Tensor:
    """Root mean square over all entries of a unit's member rows, whatever layers they lie in.

    `squares[layer]` holds a mean of squares per output unit of the layer, `entries[layer]` over how many entries.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    count = torch.zeros(group.count, dtype=torch.float64)
    for layer, means in squares.items():
        spots = torch.from_numpy(group.members[layer])
        inside = spots >= 0
        total.index_add_(0, spots[inside], means.to(torch.float64)[inside] * entries[layer])
        count.index_add_(
            0, spots[inside], torch.full((int(inside.sum()),), entries[layer], dtype=torch.float64)
        )
    return (total / count).sqrt()
