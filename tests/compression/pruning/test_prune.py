"""Which units are chosen: shares, thresholds, ties, scopes, and what is left alone with its reason."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.errors import MethodError, PruningError, TargetError
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import PRUNERS, PruneOptions, delete, find_units, prune
from fleetpress.compression.pruning.gradient_stability import gradient_mean_and_std
from fleetpress.compression.pruning.method import ScoreContext
from fleetpress.compression.statistics import NeuronStatistics

Exported = Callable[[str, bool], tuple[nn.Module, ExportedProgram]]


def program_of(model: nn.Module, *shape: int) -> ExportedProgram:
    return torch.export.export(model.eval(), (torch.randn(shape),))


def statistics(**layers: tuple[list[float], list[float], int]) -> dict[str, NeuronStatistics]:
    return {
        name.replace("_", "."): NeuronStatistics(
            mean_square=torch.tensor(mean, dtype=torch.float64) ** 2,
            variance=torch.tensor(std, dtype=torch.float64) ** 2,
            entries=entries,
            batches=10,
        )
        for name, (mean, std, entries) in layers.items()
    }


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.9])
def test_share_of_every_group(method: str, sparsity: float, exported: Exported) -> None:
    _, program = exported("resnet", True)
    result = prune(program, PruneOptions(method=method, sparsity=sparsity))
    for layer, units in result.removed.items():
        assert len(units) == math.floor(sparsity * result.units[layer])
        assert list(units) == sorted(set(units))


def test_global_share_and_coupled_layers(exported: Exported) -> None:
    _, program = exported("resnet", True)
    units = find_units(program)
    total = sum(group.count for group in units.groups)
    result = prune(program, PruneOptions(method="magnitude", sparsity=0.15, scope="global"))
    removed = sum(len(result.removed.get(group.name, ())) for group in units.groups)
    assert removed == math.floor(0.15 * total)
    assert result.removed.get("conv", ()) == result.removed.get("blocks.0.conv2", ())


def test_normalized_scores_spare_a_layer_that_is_small_as_a_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.mul_(1e-3)
    options = {"method": "magnitude", "sparsity": 0.4, "scope": "global"}
    raw = prune(program_of(model, 2, 4), PruneOptions(**options))  # type: ignore[arg-type]
    assert {name: len(units) for name, units in raw.removed.items()} == {"0": 16}
    fair = prune(program_of(model, 2, 4), PruneOptions(**options, normalize="mean"))  # type: ignore[arg-type]
    counts = {name: len(units) for name, units in fair.removed.items()}
    assert sum(counts.values()) == 16
    assert min(counts["0"], counts["2"]) >= 4
    with pytest.raises(MethodError, match="none or mean"):
        prune(program_of(model, 2, 4), PruneOptions(**options, normalize="l2"))  # type: ignore[arg-type]


def test_no_layer_is_emptied() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
        model[0].bias.mul_(1e-6)
    result = prune(program_of(model, 2, 3), PruneOptions(method="magnitude", sparsity=0.9, scope="global"))
    assert len(result.removed["0"]) == 3
    norms = torch.cat([model[0].weight, model[0].bias[:, None]], 1).norm(dim=1)
    assert set(range(4)) - set(result.removed["0"]) == {int(norms.argmax())}


def test_parts_of_a_split_are_not_emptied() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.one, self.two = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.both(x).chunk(2, -1)
            return self.one(a) + self.two(b)

    model = Halves()
    with torch.no_grad():
        model.both.weight[:4] *= 1e-6
        model.both.bias[:4] *= 1e-6
    program = program_of(model, 2, 3)
    result = prune(program, PruneOptions(method="magnitude", sparsity=0.5))
    assert len(result.removed["both"]) == 3
    assert max(result.removed["both"]) < 4
    assert delete(program, result.removed).module()(torch.randn(2, 3)).shape == (2, 2)


def test_lowest_index_goes_first_among_equals() -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.constant_(model[0].bias, -0.5)
    assert prune(program_of(model, 2, 3), PruneOptions(method="magnitude", sparsity=0.5)).removed == {
        "0": (0, 1, 2)
    }


def test_magnitude_is_root_mean_square_over_coupled_rows() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(5, 6, bias=False), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.out(self.a(x) + self.b(y))

    model = Sum()
    program = torch.export.export(model, (torch.randn(2, 3), torch.randn(2, 5)))
    pooled = torch.cat([model.a.weight, model.a.bias[:, None], model.b.weight], 1).double().square().mean(1)
    expected = tuple(sorted(pooled.argsort()[:3].tolist()))
    assert prune(program, PruneOptions(method="magnitude", sparsity=0.5)).removed == {
        "a": expected,
        "b": expected,
    }


def test_random_depends_on_the_seed_alone(exported: Exported) -> None:
    _, program = exported("article_cnn", True)
    options = PruneOptions(method="random", sparsity=0.5)
    assert prune(program, options, seed=1) == prune(program, options, seed=1)
    assert prune(program, options, seed=1).removed != prune(program, options, seed=2).removed
    assert prune(program, options, seed=0).removed == {
        "conv1": (0, 1, 2, 6),
        "conv2": (0, 2, 3, 4, 7, 12, 13, 14),
        "fc1": (0, 1, 2, 3, 5, 7, 8, 14, 15, 19, 22, 23),
    }


def test_gradient_stability_orders_by_both_moments() -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 2, 3)
    kept = statistics(**{"0": ([0.3, 0.0, 0.1, 0.0], [0.0, 0.5, 0.1, 0.2], 4)})
    # root mean squares: 0.3, 0.5, 0.141, 0.2
    assert prune(program, PruneOptions(sparsity=0.25), kept).removed == {"0": (2,)}
    assert prune(program, PruneOptions(sparsity=0.5), kept).removed == {"0": (2, 3)}
    assert prune(program, PruneOptions(sparsity=0.75), kept).removed == {"0": (0, 2, 3)}


def test_thresholds_need_both_moments_below() -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 2, 3)
    kept = statistics(**{"0": ([0.3, 0.0, 0.1, 0.0], [0.0, 0.5, 0.1, 0.2], 4)})
    options = PruneOptions(mean_threshold=0.2, std_threshold=0.3)
    assert prune(program, options, kept).removed == {"0": (2, 3)}
    at_the_limit = PruneOptions(mean_threshold=0.1, std_threshold=0.3)
    assert prune(program, at_the_limit, kept).removed == {"0": (3,)}
    with pytest.raises(PruningError, match="too small to delete any of the 4 units"):
        prune(program, PruneOptions(mean_threshold=1e-9, std_threshold=1e-9), kept)
    everything = prune(program, PruneOptions(mean_threshold=9.0, std_threshold=9.0), kept)
    assert everything.removed == {"0": (0, 2, 3)}, "the best unit stays"


@given(
    st.lists(st.tuples(*[st.floats(0, 10)] * 4), min_size=3, max_size=3),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_coupled_units_pool_all_their_entries(rows: list[tuple[float, ...]], one: int, other: int) -> None:
    found = find_units(PAIR)
    a, b, c, d = (list(column) for column in zip(*rows, strict=True))
    kept = statistics(a=(a, b, one), b=(c, d, other))
    context = ScoreContext(values=tensors(PAIR), layers=found.layers, statistics=kept, seed=0)
    mean, std = gradient_mean_and_std(context, found.groups[0])
    for unit, (mean_a, std_a, mean_b, std_b) in enumerate(rows):
        n = one + other
        assert float(mean[unit]) == pytest.approx(
            math.sqrt((one * mean_a**2 + other * mean_b**2) / n), rel=1e-12
        )
        assert float(std[unit]) == pytest.approx(
            math.sqrt((one * std_a**2 + other * std_b**2) / n), rel=1e-12
        )


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 3), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.a(x) * self.b(y))


PAIR = torch.export.export(Pair(), (torch.randn(2, 3), torch.randn(2, 5)))


def test_targets_and_ignore(exported: Exported) -> None:
    _, program = exported("resnet", True)
    only = prune(program, PruneOptions(method="random", sparsity=0.5, targets=("re:.*conv1",)))
    assert list(only.removed) == ["blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1"]
    ignored = prune(program, PruneOptions(method="random", sparsity=0.5, ignore=("blocks.0.conv2",)))
    assert "conv" not in ignored.removed
    assert ignored.skipped["conv"] == "coupled with blocks.0.conv2, which is ignored"
    alone = PruneOptions(method="random", sparsity=0.5, targets=("conv",))
    with pytest.raises(PruningError, match=r"coupled with blocks.0.conv2, which is not among the targets"):
        prune(program, alone)
    with pytest.raises(TargetError, match="did you mean 'conv'"):
        prune(program, PruneOptions(method="random", sparsity=0.5, targets=("konv",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PruneOptions(method="best", sparsity=0.5), "'best' is unknown"),
        (PruneOptions(method="magnitude"), "give either"),
        (PruneOptions(sparsity=0.5, mean_threshold=1.0, std_threshold=1.0), "give either"),
        (PruneOptions(mean_threshold=1.0), "belong together"),
        (PruneOptions(mean_threshold=1.0, std_threshold=-1.0), "positive"),
        (
            PruneOptions(method="magnitude", mean_threshold=1.0, std_threshold=1.0),
            "magnitude has no gradients",
        ),
        (PruneOptions(sparsity=1.0), "not between 0 and 1"),
        (PruneOptions(sparsity=0.5, scope="model"), "layer or global"),
        (PruneOptions(sparsity=0.5), "needs the gradient statistics of 0"),
    ],
)
def test_options_that_do_not_fit(options: PruneOptions, message: str) -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 2, 3)
    with pytest.raises(MethodError, match=message):
        prune(program, options)


def test_nan_scores_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1, 1] = math.nan
    with pytest.raises(PruningError, match="0: scores are not finite"):
        prune(program_of(model, 2, 3), PruneOptions(method="magnitude", sparsity=0.5))


def test_nothing_to_delete_names_the_reasons() -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.special.bessel_j0(self.two(self.one(x).softmax(-1))))

    with pytest.raises(PruningError) as caught:
        prune(program_of(Softmax(), 2, 3), PruneOptions(method="magnitude", sparsity=0.5))
    message = str(caught.value)
    assert "one: softmax: mixes the units along their dim" in message
    assert "two: special_bessel_j0: the operator aten.special_bessel_j0.default is not understood" in message
    assert "three: output: an output of the model" in message
    with pytest.raises(PruningError, match="no Linear or Conv layer"):
        prune(program_of(nn.Sequential(nn.ReLU()), 2, 3), PruneOptions(method="magnitude", sparsity=0.5))


def test_every_skipped_layer_has_a_reason(architecture: str, exported: Exported) -> None:
    _, program = exported(architecture, True)
    units = find_units(program)
    reached = {layer for group in units.groups for layer in group.layers}
    assert reached | set(units.skipped) == set(units.totals)
    assert not reached & set(units.skipped)
    assert all(units.skipped.values())


def test_methods_are_described() -> None:
    for name, method in PRUNERS.items():
        assert method.name == name
        assert method.summary
        assert method.paper
    needing = [name for name, method in PRUNERS.items() if method.needs_gradients]
    assert needing == ["gradient_stability", "taylor", "fisher"]
