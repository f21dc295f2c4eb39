"""Single layers that lose a share of their own: units here, zeros beside; and names that are no layer's."""

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression.errors import MethodError, PruningError, TargetError
from fleetpress.compression.gradual import GradualOptions, Zeros
from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import PruneOptions, prune
from fleetpress.compression.sparsity.zero_layers import least_zeros, zero_layers
from fleetpress.storage.programs import module_to_program


class Residual(nn.Module):
    """Two layers whose outputs are added lose the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of x [N, 4]."""
        scores: Tensor = self.last((self.left(x) + self.right(x)).relu())
        return scores


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))


def _removed(module: nn.Module, inputs: int, **options: object) -> dict[str, int]:
    program = module_to_program(module.eval(), [torch.zeros(2, inputs)])
    found = prune(program, PruneOptions(method="magnitude", **options))  # type: ignore[arg-type]
    return {name: len(units) for name, units in found.removed.items()}


def test_each_layer_loses_its_own_share() -> None:
    assert _removed(_net(), 6, layers={"0": 0.25, "2": 0.5}) == {"0": 5, "2": 5}
    assert _removed(_net(), 6, layers={"0": 0.25}) == {"0": 5}
    assert _removed(_net(), 6, sparsity=0.5, layers={"0": 0.0}) == {"2": 5}


def test_a_share_of_one_layer_is_that_of_those_coupled_with_it() -> None:
    torch.manual_seed(0)
    assert _removed(Residual(), 4, layers={"right": 0.5}) == {"left": 4, "right": 4}
    with pytest.raises(MethodError, match="left, right lose the same units"):
        _removed(Residual(), 4, layers={"left": 0.25, "right": 0.5})


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"layers": {"1": 0.5}}, TargetError, "'1', which is no layer here"),
        ({"layers": {"0": 1.0}}, MethodError, "0: sparsity 1.0 is not from 0 to below 1"),
        ({"layers": {"0": 0.5}, "scope": "global", "sparsity": 0.5}, MethodError, "scope global"),
        ({"layers": {"0": 0.01}}, PruningError, "shares of `layers` are too small"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, object], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        _removed(_net(), 6, **options)


def test_zeros_of_single_layers() -> None:
    program = module_to_program(_net().eval(), [torch.zeros(2, 6)])
    options = {"method": "magnitude_unstructured", "layers": {"0": {"sparsity": 0.75}}}
    found = zero_layers(layers(program), tensors(program), options)
    assert {name: int((~weight.kept).sum()) for name, weight in found.weights.items()} == {"0.weight": 90}
    assert found.skipped == {"2": "has no share of zeros", "4": "has no share of zeros"}
    both = {**options, "sparsity": 0.5}
    zeros, _ = least_zeros(layers(program), tensors(program), both)
    assert zeros == {"0.weight": 90, "2.weight": 100, "4.weight": 15}


def test_zeros_of_single_weights_grow_to_their_own_shares() -> None:
    params = {name: nn.Parameter(torch.randn(10, 10)) for name in "ab"}
    options = GradualOptions(weights=("a", "b"), sparsity=None, shares={"a": 0.9}, ramp=1.0, interval=1)
    zeros = Zeros(params, {}, options, steps=3)
    for _ in range(3):
        zeros.after_step()
    assert [int((params[name] == 0).sum()) for name in "ab"] == [90, 0]
    for wrong in ({"shares": {}}, {"shares": {"a": 1.0}}, {"shares": {"a": 0.5}, "scope": "global"}):
        with pytest.raises(MethodError):
            GradualOptions(weights=("a",), sparsity=None, **wrong)  # type: ignore[arg-type]
