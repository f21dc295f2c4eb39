"""How the ranks of a data-parallel training talk to each other: two sums."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Collective(Protocol):
    """Sums over all ranks; every rank must call the same ones in the same order."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks."""

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks; its gradient is the sum over the ranks of the result's gradients."""
        ...


class Alone:
    """The only rank."""

    rank = 0
    size = 1

    def sum_(self, tensors: list[Tensor]) -> None:
        """One rank's sum is what it has."""

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """One rank's sum is what it has."""
        return tensor


ALONE = Alone()


def share_first(tensors: list[Tensor], collective: Collective) -> None:
    """Replace each tensor, in place, by the first rank's: solutions may differ between machines."""
    if collective.size == 1 or not tensors:
        return
    with torch.no_grad():
        given = [value.detach() for value in tensors]
        for value in given:
            value.mul_(float(collective.rank == 0))
        collective.sum_(given)


class SynchronizedBatchNorm(nn.Module):
    """Batch normalization in train mode over the batches of all ranks, as one process computes it over the whole.

    `share` is 0.0 on a rank that has no sample of the batch and stands in with a copy, else 1.0.
    """

    def __init__(self, collective: Collective) -> None:
        super().__init__()
        self._collective = collective
        self.share = 1.0

    def forward(
        self,
        x: Tensor,
        *,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalized `x` [samples, channels, ...]; the running statistics are updated in place."""
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        own = x.new_tensor([self.share * x.numel() / x.shape[1]])
        sums = self._collective.differentiable_sum(torch.cat([self.share * x.sum(dims), own]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = x - mean.view(shape)
        # Centred sums: those of plain squares would lose the digits of a large mean.
        variance = self._collective.differentiable_sum(self.share * centered.square().sum(dims)) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
        normal = centered * torch.rsqrt(variance + eps).view(shape)
        if weight is not None:
            normal = normal * weight.view(shape)
        return normal if bias is None else normal + bias.view(shape)
