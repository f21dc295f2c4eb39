"""What ranks must have in common before they begin."""

import torch
from torch import Tensor

from fleetpress.compression.collectives import ALONE, share_first


class OfTwo:
    """A rank of two, whose other one holds `theirs`."""

    size = 2

    def __init__(self, rank: int, theirs: list[Tensor]) -> None:
        self.rank = rank
        self._theirs = theirs

    def sum_(self, tensors: list[Tensor]) -> None:
        """Add what the other rank gives: nothing, if it is not the first."""
        for mine, other in zip(tensors, self._theirs, strict=True):
            mine.add_(other, alpha=float(self.rank == 1))

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """Not used here."""
        raise AssertionError


def test_every_rank_takes_what_the_first_has() -> None:
    first, second = [torch.tensor([1.0, 2.0], requires_grad=True)], [torch.tensor([1.5, 2.5])]
    share_first(first, OfTwo(0, second))
    share_first(second, OfTwo(1, [value.detach() for value in first]))
    assert torch.equal(first[0], torch.tensor([1.0, 2.0]))
    assert torch.equal(second[0], first[0])
    share_first(first, ALONE)
    assert torch.equal(first[0], torch.tensor([1.0, 2.0]))
