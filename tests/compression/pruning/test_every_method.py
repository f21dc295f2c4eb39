"""What every pruning method promises; a method that is added to the table is looked at here without an edit."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression.errors import MethodError
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import PRUNERS, PruneOptions, delete, find_units, prune
from fleetpress.compression.pruning.method import ScoreContext
from fleetpress.compression.statistics import NeuronStatistics

INPUTS = torch.linspace(-1, 1, 40).reshape(5, 8)


class Net(nn.Module):
    """Two layers whose outputs are added, so that they lose the same units, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.middle, self.out = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.middle(torch.relu(self.left(x) + self.right(x)))))


def made() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (INPUTS,))


PROGRAM = made()
STATISTICS = {
    name: NeuronStatistics(
        mean_square=torch.linspace(0.1, 1.0, units, dtype=torch.float64),
        variance=torch.linspace(1.0, 0.2, units, dtype=torch.float64) ** 2,
        entries=entries,
        batches=4,
        gate_square=torch.linspace(0.3, 0.1, units, dtype=torch.float64),
        product_square=torch.linspace(0.2, 0.4, units, dtype=torch.float64),
    )
    for name, units, entries in (("left", 12, 9), ("right", 12, 8), ("middle", 10, 13), ("out", 3, 11))
}
OBSERVED = {
    name: item.inputs for name, item in calibrate(PROGRAM, {"inputs": INPUTS}, len(INPUTS)).weights.items()
}


@pytest.fixture(params=sorted(PRUNERS))
def method(request: pytest.FixtureRequest) -> str:
    """The name of a method."""
    return str(request.param)


def chosen(method: str, **options: object) -> dict[str, tuple[int, ...]]:
    wanted = PruneOptions(method=method, **{"sparsity": 0.4, **options})  # type: ignore[arg-type]
    return dict(prune(PROGRAM, wanted, STATISTICS, seed=3, inputs=OBSERVED).removed)


def test_it_is_described(method: str) -> None:
    entry = PRUNERS[method]
    assert entry.name == method
    assert entry.summary
    assert entry.paper


def test_scores_are_finite_numbers_one_per_unit_and_the_same_each_time(method: str) -> None:
    units = find_units(PROGRAM)
    context = ScoreContext(
        values=tensors(PROGRAM), layers=units.layers, statistics=STATISTICS, seed=3, inputs=OBSERVED
    )
    for group in units.groups:
        scores = PRUNERS[method].score(context, group)
        assert scores.dtype == torch.float64
        assert scores.shape == (group.count,)
        assert scores.isfinite().all()
        assert torch.equal(scores, PRUNERS[method].score(context, group))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_shares_are_exact_and_no_layer_is_emptied(method: str, sparsity: float) -> None:
    removed = chosen(method, sparsity=sparsity)
    for layer, count in {"left": 12, "right": 12, "middle": 10}.items():
        assert len(removed.get(layer, ())) == min(math.floor(sparsity * count), count - 1)
    assert "out" not in removed


def test_coupled_layers_lose_the_same_units(method: str) -> None:
    removed = chosen(method)
    assert removed["left"] == removed["right"]


def test_a_global_share_counts_all_units_together(method: str) -> None:
    removed = chosen(method, scope="global")
    assert len(removed.get("left", ())) + len(removed.get("middle", ())) == math.floor(0.4 * 22)


def test_what_is_left_runs(method: str) -> None:
    smaller = delete(PROGRAM, chosen(method)).module()
    assert smaller(INPUTS).shape == (5, 3)
    assert smaller(INPUTS).isfinite().all()


def test_it_says_whether_it_needs_gradients(method: str) -> None:
    wanted = PruneOptions(method=method, sparsity=0.4)
    if PRUNERS[method].needs_gradients:
        with pytest.raises(MethodError, match="needs the gradient statistics"):
            prune(PROGRAM, wanted, inputs=OBSERVED)
    else:
        found = prune(PROGRAM, wanted, seed=3, inputs=OBSERVED)
        assert found.removed == chosen(method), "gradients change nothing"


def test_it_says_whether_it_needs_products_and_inputs(method: str) -> None:
    wanted = PruneOptions(method=method, sparsity=0.4)
    without = {
        name: replace(item, gate_square=None, product_square=None) for name, item in STATISTICS.items()
    }
    if PRUNERS[method].needs_products:
        with pytest.raises(MethodError, match="lack products"):
            prune(PROGRAM, wanted, without, inputs=OBSERVED)
    elif PRUNERS[method].needs_inputs:
        with pytest.raises(MethodError, match="needs statistics of what left reads"):
            prune(PROGRAM, wanted, STATISTICS)
    else:
        assert prune(PROGRAM, wanted, without, seed=3).removed == chosen(method), "neither changes anything"


def test_weights_are_only_looked_at(method: str) -> None:
    before = {name: value.clone() for name, value in tensors(PROGRAM).items()}
    chosen(method)
    assert all(torch.equal(value, before[name]) for name, value in tensors(PROGRAM).items())
