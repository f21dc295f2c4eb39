"""Gradient statistics against their definition in float64, and their merge."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.program import trainable
from fleetpress.compression.statistics import GradientCollector, GradientStatistics

Gradients = dict[str, Tensor]


class Everything(nn.Module):
    """One layer of each way to lay out units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.columns = nn.Parameter(torch.randn(64, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of [samples, 2, 2, 2]."""
        x = self.norm(self.up(self.grouped(self.conv(x)))).flatten(1)
        return self.head(x @ self.columns)  # type: ignore[no-any-return]


@functools.cache
def program() -> ExportedProgram:
    """The program of `Everything`."""
    torch.manual_seed(0)
    return torch.export.export(Everything(), (torch.randn(2, 2, 2, 2),))


def gradients(batches: int, *, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> list[Gradients]:
    """Made-up gradients of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    values = program().state_dict
    return [
        {
            name: offset + scale * torch.randn(values[name].shape, generator=generator)
            for name in trainable(program())
        }
        for _ in range(batches)
    ]


def collected(batches: list[Gradients], *, products: bool = False) -> GradientStatistics:
    """What a collector makes of them; with products, at weights that move from batch to batch."""
    collector = GradientCollector(program(), products=products)
    for number, batch in enumerate(batches):
        collector.update(batch, weights(number))
    return collector.statistics()


def weights(number: int) -> Gradients:
    """The program's weights at the batch of that number."""
    return {name: value.detach() * (1 + 0.1 * number) for name, value in program().state_dict.items()}


def units(layer: str, weight: Tensor) -> Tensor:
    """One row per output unit, spelled out by hand."""
    if layer == "columns":
        return weight.t()
    if layer != "up":
        return weight.reshape(len(weight), -1)
    # 6 inputs and 4 outputs in 2 groups: weight [6, 2, 2, 2]; output 2 * group + o has inputs 3 * group ... + 2.
    rows = [weight[3 * group : 3 * group + 3, o].reshape(-1) for group in (0, 1) for o in (0, 1)]
    return torch.stack(rows)


def reference(layer: str, batches: list[Gradients]) -> tuple[Tensor, Tensor]:
    """The definition in float64: squared means and variances, averaged over each unit's entries."""
    weight = "columns" if layer == "columns" else f"{layer}.weight"
    rows = torch.stack([units(layer, batch[weight].double()) for batch in batches])
    if f"{layer}.bias" in batches[0]:
        bias = torch.stack([batch[f"{layer}.bias"].double() for batch in batches])
        rows = torch.cat([rows, bias[..., None]], dim=2)
    mean = rows.mean(0)
    return mean.square().mean(1), (rows - mean).square().mean(0).mean(1)


def cancelling() -> list[Gradients]:
    """A large gradient, its opposite, and small ones in between: float32 sums would lose the mean."""
    (large,), small = gradients(1, scale=1e3), gradients(2, seed=1, scale=1e-3)
    return [large, *small, {name: -value for name, value in large.items()}]


SCENES = {
    "random": gradients(7),
    "one_batch": gradients(1),
    "cancelling": cancelling(),
    "tiny": gradients(5, scale=1e-25),
    "nearly_constant": gradients(9, scale=1e-3, offset=1.0),
}


@pytest.mark.parametrize("scene", SCENES)
def test_statistics_are_those_of_the_definition(scene: str) -> None:
    neurons = collected(SCENES[scene]).neurons()
    assert list(neurons) == ["conv", "grouped", "up", "columns", "head"]
    for layer, got in neurons.items():
        mean_square, variance = reference(layer, SCENES[scene])
        torch.testing.assert_close(got.mean_square, mean_square, rtol=1e-6, atol=0)
        # One batch has no variance: what rounding leaves is measured against the squares it is the difference of.
        floor = 1e-14 * float((mean_square + variance).max())
        torch.testing.assert_close(got.variance, variance, rtol=1e-6, atol=floor)
        assert (got.variance >= 0).all()
        assert got.batches == len(SCENES[scene])
    assert {layer: got.entries for layer, got in neurons.items()} == {
        "conv": 19,
        "grouped": 2,
        "up": 13,
        "columns": 64,
        "head": 6,
    }


@pytest.mark.parametrize("scene", ["random", "one_batch", "cancelling", "nearly_constant"])
def test_products_are_those_of_the_weights_of_each_batch(scene: str) -> None:
    batches = SCENES[scene]
    for layer, got in collected(batches, products=True).neurons().items():
        terms = []
        for number, batch in enumerate(batches):
            values, weight = weights(number), "columns" if layer == "columns" else f"{layer}.weight"
            products = units(layer, batch[weight].double() * values[weight])
            if f"{layer}.bias" in batch:
                bias = batch[f"{layer}.bias"].double() * values[f"{layer}.bias"]
                products = torch.cat([products, bias[:, None]], 1)
            # `up` alone stands in front of a normalization: its gate lies behind that.
            parts = ("norm.weight", "norm.bias") if layer == "up" else ()
            behind = [batch[name].double() * values[name] for name in parts]
            gate = torch.stack(behind).sum(0) if behind else products.sum(1)
            terms.append((gate.square(), products.square().sum(1)))
        gate_square, product_square = (torch.stack(part).mean(0) for part in zip(*terms, strict=True))
        assert got.gate_square is not None
        assert got.product_square is not None
        # Products are added up in the gradients' own float32.
        torch.testing.assert_close(
            got.gate_square, gate_square, rtol=1e-5, atol=1e-10 * float(product_square.max())
        )
        torch.testing.assert_close(got.product_square, product_square, rtol=1e-5, atol=0)


def test_products_merge_and_come_back_from_tensors_too() -> None:
    batches = gradients(5)
    whole = collected(batches, products=True)
    parts = [GradientCollector(program(), products=True) for _ in range(2)]
    for number, batch in enumerate(batches):
        parts[number % 2].update(batch, weights(number))
    merged = parts[1].statistics().merge(parts[0].statistics())
    back = GradientStatistics.from_tensors(merged.to_tensors())
    for layer, got in back.neurons().items():
        wanted = whole.neurons()[layer]
        torch.testing.assert_close(got.gate_square, wanted.gate_square, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.product_square, wanted.product_square, rtol=1e-12, atol=0)
    close(back, collected(batches))
    with pytest.raises(DataMismatchError, match="different programs"):
        merged.merge(collected(batches))


def close(left: GradientStatistics, right: GradientStatistics) -> None:
    """The same neurons to 1e-12 of what they are made of."""
    for layer, got in left.neurons().items():
        wanted = right.neurons()[layer]
        size = float((wanted.mean_square + wanted.variance).max())
        torch.testing.assert_close(got.mean_square, wanted.mean_square, rtol=1e-12, atol=1e-12 * size)
        torch.testing.assert_close(got.variance, wanted.variance, rtol=1e-12, atol=1e-12 * size)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
def test_merging_disjoint_batches_in_any_order_is_collecting_them_all(
    order: list[int], cuts: set[int]
) -> None:
    batches = gradients(6, seed=2)
    edges = [0, *sorted(cuts), 6]
    parts = [collected([batches[i] for i in order[a:b]]) for a, b in itertools.pairwise(edges)]
    whole = functools.reduce(GradientStatistics.merge, parts)
    assert whole.batches == 6
    close(whole, collected(batches))


def test_a_merge_changes_neither_side() -> None:
    left, right = collected(gradients(2)), collected(gradients(3, seed=1))
    before = {name: value.clone() for name, value in left.to_tensors().items()}
    left.merge(right)
    assert all(torch.equal(value, before[name]) for name, value in left.to_tensors().items())


def test_statistics_taken_early_stay_as_they_are() -> None:
    collector = GradientCollector(program())
    first, second = gradients(2)
    collector.update(first)
    early = collector.statistics()
    collector.update(second)
    close(early, collected([first]))


def test_tensors_bring_everything_back() -> None:
    statistics = collected(gradients(3))
    back = GradientStatistics.from_tensors(statistics.to_tensors())
    assert back.to_tensors().keys() == statistics.to_tensors().keys()
    assert all(torch.equal(value, back.to_tensors()[name]) for name, value in statistics.to_tensors().items())
    assert all(value.is_contiguous() for value in statistics.to_tensors().values())


def test_statistics_of_other_programs_and_of_nothing_are_refused() -> None:
    other = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(DataMismatchError, match="different programs"):
        collected(gradients(1)).merge(GradientCollector(other).statistics())
    with pytest.raises(DataMismatchError, match="no batch"):
        GradientCollector(program()).statistics().neurons()
    with pytest.raises(DataMismatchError, match="batches"):
        GradientStatistics.from_tensors({})


def test_a_tied_weight_is_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))  # type: ignore[no-any-return]

    collector = GradientCollector(torch.export.export(Twice(), (torch.zeros(2, 4),)))
    assert len(collector.statistics().layers) == 1
    assert len([name for name in collector.names if name.endswith("weight")]) == 1
