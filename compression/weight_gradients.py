"""First and second moments of the gradients of single weights over mini-batches, collected in one pass.

Of every weight of a program's layers that training would change, float64 in the weight's own shape: the sum of its
gradients and the sum of their squares, so two such numbers a weight. They are by state name; tied weights once, by
their first name. Sums over disjoint batches add up to those over all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.device import CPU
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors, trainable

_GRADIENTS, _SQUARES = "|gradients", "|gradient_squares"


@dataclass(frozen=True, kw_only=True)
class WeightMoments:
    """`mean` and `mean_square` of a weight's gradients over batches, float64 in the weight's shape."""

    mean: Tensor
    mean_square: Tensor


@dataclass(frozen=True, kw_only=True)
class WeightSums:
    """Sums over batches of a weight's gradients, and of their squares; float64 in the weight's shape."""

    gradients: Tensor
    squares: Tensor

    def plus(self, other: "WeightSums") -> "WeightSums":
        """The sums over both sets of batches."""
        return WeightSums(gradients=self.gradients + other.gradients, squares=self.squares + other.squares)

    def over(self, batches: int) -> WeightMoments:
        """What the sums over so many batches, at least one, are on average."""
        return WeightMoments(mean=self.gradients / batches, mean_square=self.squares / batches)


def as_tensors(sums: Mapping[str, WeightSums]) -> dict[str, Tensor]:
    """Plain tensors by name, for a file."""
    found = {name + _GRADIENTS: item.gradients for name, item in sums.items()}
    return found | {name + _SQUARES: item.squares for name, item in sums.items()}


def from_tensors(values: Mapping[str, Tensor]) -> dict[str, WeightSums]:
    """What `as_tensors` gave, among other tensors. Raises KeyError if a half of it is missing."""
    names = [key.removesuffix(_SQUARES) for key in values if key.endswith(_SQUARES)]
    return {
        name: WeightSums(gradients=values[name + _GRADIENTS], squares=values[name + _SQUARES])
        for name in names
    }


def merged(left: Mapping[str, WeightSums], right: Mapping[str, WeightSums]) -> dict[str, WeightSums]:
    """Sums over both sets of batches. Raises DataMismatchError for those of different weights."""
    if _shapes(left) != _shapes(right):
        raise DataMismatchError(
            "gradients of the weights of different programs cannot be merged; collect them again"
        )
    return {name: sums.plus(right[name]) for name, sums in left.items()}


def _shapes(sums: Mapping[str, WeightSums]) -> dict[str, torch.Size]:
    return {name: item.gradients.shape for name, item in sums.items()}


class WeightCollector:
    """Adds up the gradients of every weight, batch by batch, on the device where they are computed."""

    def __init__(self, program: ExportedProgram, device: torch.device = CPU) -> None:
        stored, learned = tensors(program), set(trainable(program))
        owners = aliases(stored)
        names = (owners.get(name, name) for layer in layers(program) for name in layer.weights)
        self._sums = {
            name: WeightSums(gradients=_zeros(stored[name], device), squares=_zeros(stored[name], device))
            for name in dict.fromkeys(names)
            if name in learned
        }

    @property
    def names(self) -> tuple[str, ...]:
        """State names of the weights whose gradients `update` takes."""
        return tuple(self._sums)

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Count one batch: the gradient of its mean loss, by state name."""
        for name, sums in self._sums.items():
            wide = gradients[name].double()
            sums.gradients.add_(wide)
            sums.squares.addcmul_(wide, wide)

    def sums(self) -> dict[str, WeightSums]:
        """The sums so far, in the processor's memory; later updates leave them as they are."""
        return {
            name: WeightSums(gradients=item.gradients.clone().to(CPU), squares=item.squares.clone().to(CPU))
            for name, item in self._sums.items()
        }


def _zeros(weight: Tensor, device: torch.device) -> Tensor:
    return torch.zeros(weight.shape, dtype=torch.float64, device=device)
