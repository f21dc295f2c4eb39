"""Pooling channels last in trainings: the same values and gradients, whatever follows."""

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression.modes import training_module
from fleetpress.compression.pooling import channels_last
from fleetpress.storage.programs import module_to_program


class Strided(nn.Module):
    """Looks at memory itself after pooling."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_strided(nn.functional.max_pool2d(x, 2), (2, 9), (9, 1))


class Views(nn.Module):
    """A view right after pooling, which memory in another order would not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x), 2)
        x = nn.functional.max_pool2d(self.second(x).relu(), 3, 2, 1)
        found: Tensor = self.last(x.view(-1, 16))
        return found


def test_values_and_gradients_are_those_of_the_module() -> None:
    torch.manual_seed(0)
    net, images = Views().eval(), torch.randn(6, 1, 12, 12)
    module = training_module(module_to_program(net, [images[:2]]))
    assert any(node.target is channels_last for node in module.graph.nodes)
    ours, theirs = module(images), net(images)
    torch.testing.assert_close(ours, theirs)
    names, leaves = zip(*net.named_parameters(), strict=True)
    own = dict(module.named_parameters())
    wanted = torch.autograd.grad(theirs.square().sum(), leaves)
    found = torch.autograd.grad(ours.square().sum(), [own[name] for name in names])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("net", "example"),
    [
        (Strided(), torch.randn(2, 1, 6, 6)),
        (nn.MaxPool2d(2), torch.randn(3, 6, 6)),
        (nn.ReLU(), torch.randn(2, 3)),
    ],
    ids=["looks at memory", "one image", "no pooling"],
)
def test_other_graphs_stay_as_they_are(net: nn.Module, example: Tensor) -> None:
    module = training_module(module_to_program(net.eval(), [example]))
    assert all(node.target is not channels_last for node in module.graph.nodes)
    torch.testing.assert_close(module(example), net(example))
