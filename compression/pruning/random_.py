"""Random: the baseline that every method has to beat."""

import hashlib

import torch
from torch import Tensor

from fleetpress.compression.pruning.method import PruningMethod, ScoreContext
from fleetpress.compression.pruning.units import UnitGroup


def score(context: ScoreContext, group: UnitGroup) -> Tensor:
    """Per unit its place in a permutation drawn from the seed and the group's name, scaled to [0, 1)."""
    digest = hashlib.sha256(f"{context.seed}:{group.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(group.count, generator=generator).to(torch.float64) / group.count


METHOD = PruningMethod(
    name="random",
    summary="deletes units at random, the same ones for the same seed; needs no data",
    paper="A baseline; see Blalock et al. 2020, What is the State of Neural Network Pruning? (arXiv:2003.03033)",
    score=score,
)
