"""Criteria from gradients of single weights, against per-sample gradients of torch.func and against torch-pruning."""

from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call, grad, vmap

from fleetpress.compression.errors import DataMismatchError, MethodError, PruningError
from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors
from fleetpress.compression.sparsity import SPARSIFIERS, start
from fleetpress.compression.sparsity.zero_layers import ZeroedLayers, zero_layers
from fleetpress.compression.statistics import GradientStatistics
from fleetpress.compression.training import TrainOptions, collect, train
from fleetpress.compression.weight_gradients import WeightMoments

SCORED = sorted(name for name, method in SPARSIFIERS.items() if method.needs_gradients)
DATA = {
    "inputs": torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(3)),
    "targets": torch.arange(12) % 3,
}


def net() -> nn.Sequential:
    """Weights of three layouts: a convolution in groups, a transposed one, rows of a matrix."""
    torch.manual_seed(0)
    mixed = [nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Tanh()]
    return nn.Sequential(*mixed, nn.Flatten(), nn.Linear(54, 3)).eval()


def exported(module: nn.Module) -> ExportedProgram:
    return torch.export.export(module, (DATA["inputs"],), dynamic_shapes=({0: Dim.DYNAMIC},))


NET = net()
PROGRAM = exported(NET)
LAYERS = layers(PROGRAM)


def collected(data: dict[str, Tensor], batch_size: int) -> GradientStatistics:
    return collect(PROGRAM, data, batch_size, loss="cross_entropy", seed=0, weights=True)


def per_sample() -> dict[str, Tensor]:
    """Gradients of every sample's loss [samples, ...] by parameter, float64."""
    values = {name: value.detach().double() for name, value in NET.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        scores = functional_call(NET, values, (image.unsqueeze(0),))
        return nn.functional.cross_entropy(scores, target.unsqueeze(0))

    found: dict[str, Tensor] = vmap(grad(loss), (None, 0, 0))(
        values, DATA["inputs"].double(), DATA["targets"]
    )
    return found


def zeroed(gradients: dict[str, WeightMoments], **options: Any) -> ZeroedLayers:
    return zero_layers(LAYERS, tensors(PROGRAM), {"sparsity": 0.5, **options}, None, gradients)


def scored(method: str, gradients: dict[str, WeightMoments]) -> dict[str, Tensor]:
    score = SPARSIFIERS[method].score
    assert score is not None
    values = tensors(PROGRAM)
    return {name: score(values[name].detach(), moments) for name, moments in gradients.items()}


def test_scores_are_those_of_per_sample_gradients() -> None:
    moments, samples = collected(DATA, 1).moments(), per_sample()
    assert list(moments) == ["0.weight", "2.weight", "5.weight"]
    found = {method: scored(method, moments) for method in SCORED}
    for name in moments:
        weight, gradients = tensors(PROGRAM)[name].detach().double(), samples[name]
        wanted = {
            "fisher_unstructured": weight**2 * (gradients**2).sum(0) / 2 / 12,
            "taylor_unstructured": (weight * gradients.sum(0)).abs() / 12,
            "gradient_stability_unstructured": torch.hypot(gradients.mean(0), gradients.std(0, correction=0)),
        }
        assert sorted(wanted) == SCORED
        for method, scores in wanted.items():
            assert scores.shape == weight.shape
            torch.testing.assert_close(
                found[method][name], scores, rtol=1e-4, atol=1e-5 * float(scores.max())
            )
            kept = zeroed(moments, method=method).weights[name].kept
            assert int((~kept).sum()) == weight.numel() // 2
            # The same weights go, but for scores too close to tell apart in float32.
            median = scores.flatten().sort().values[weight.numel() // 2]
            apart = (scores - median).abs() > 1e-3 * float(scores.max())
            assert torch.equal(kept[apart], (scores > median)[apart])
            assert float(apart.float().mean()) > 0.8


@pytest.mark.parametrize("method", ["fisher_unstructured", "taylor_unstructured"])
def test_units_have_the_importance_that_torch_pruning_gives_them(method: str) -> None:
    scorer = {
        "fisher_unstructured": torch_pruning.importance.GroupHessianImportance,
        "taylor_unstructured": torch_pruning.importance.GroupTaylorImportance,
    }[method](group_reduction=None, normalizer=None)
    model = net()
    nn.functional.cross_entropy(model(DATA["inputs"]), DATA["targets"]).backward()
    if method == "fisher_unstructured":
        scorer.accumulate_grad(model)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=DATA["inputs"])
    last = graph.get_pruning_group(model[5], torch_pruning.prune_linear_out_channels, [0, 1, 2])
    (theirs,) = scorer(last)
    ours = scored(method, collected(DATA, 12).moments())["5.weight"].sum(1)
    halves = 2 if method == "fisher_unstructured" else 1  # it leaves out the half of the expansion
    torch.testing.assert_close(ours * halves, theirs.double(), rtol=1e-5, atol=0)


def test_moments_of_disjoint_batches_merge_and_come_back_from_tensors() -> None:
    whole = collected(DATA, 3)
    first, second = ({name: value[part] for name, value in DATA.items()} for part in (slice(6), slice(6, 12)))
    merged = collected(second, 3).merge(collected(first, 3))
    back = GradientStatistics.from_tensors(merged.to_tensors())
    assert back.batches == whole.batches == 4
    assert back.neurons() == {}
    for name, moments in whole.moments().items():
        torch.testing.assert_close(back.moments()[name].mean, moments.mean, rtol=1e-12, atol=1e-18)
        torch.testing.assert_close(
            back.moments()[name].mean_square, moments.mean_square, rtol=1e-12, atol=1e-24
        )
    other = exported(nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))
    foreign = collect(other, DATA, 3, loss="cross_entropy", seed=0, weights=True)
    with pytest.raises(DataMismatchError, match="different programs"):
        whole.merge(foreign)


def test_those_of_a_training_add_up_to_what_neurons_have() -> None:
    options = TrainOptions(epochs=2, batch_size=4, lr=0.01)
    single, neurons = (
        train(PROGRAM, DATA, options, loss="cross_entropy", seed=1, collect=True, weights=weights)
        for weights in (True, False)
    )
    assert all(torch.equal(value, neurons.values[name]) for name, value in single.values.items())
    assert single.statistics is not None
    assert neurons.statistics is not None
    assert single.statistics.batches == 6
    for layer, name in (("0", "0.weight"), ("5", "5.weight")):
        sums, units = single.statistics.weights[name], neurons.statistics.layers[layer]
        assert torch.equal(sums.gradients.flatten(1), units.weight)
        assert (sums.squares.flatten(1).sum(1) < units.squares).all()  # which count biases, too


def test_all_weights_are_ranked_together_or_after_the_mean_of_their_tensor() -> None:
    moments = collected(DATA, 4).moments()
    scores = scored("fisher_unstructured", moments)
    for normalize in ("none", "mean"):
        found = zeroed(moments, method="fisher_unstructured", scope="global", normalize=normalize).weights
        means = {name: value.mean() if normalize == "mean" else 1.0 for name, value in scores.items()}
        gone, kept = (
            torch.cat(
                [
                    (scores[name] / means[name])[weight.kept == is_kept].flatten()
                    for name, weight in found.items()
                ]
            )
            for is_kept in (False, True)
        )
        assert len(gone) == (len(gone) + len(kept)) // 2
        assert gone.max() <= kept.min()


def test_a_weight_without_gradients_is_left_out_of_a_ranking_of_all() -> None:
    moments = collected(DATA, 4).moments()
    some = {name: value for name, value in moments.items() if name != "2.weight"}
    found = zeroed(some, method="taylor_unstructured", scope="global")
    assert found.skipped == {"2": "the gradients of 2.weight are not known"}
    assert list(found.weights) == ["0.weight", "5.weight"]
    with pytest.raises(PruningError, match=r"no weight can be zeroed: 0: the gradients of 0\.weight are not"):
        zeroed({}, method="taylor_unstructured", scope="global")


def test_a_weight_that_is_tied_is_counted_once_and_a_frozen_one_not_at_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("frozen", torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x))) @ self.frozen

    data = {"inputs": torch.randn(4, 3), "targets": torch.arange(4) % 3}
    program = torch.export.export(Twice().eval(), (data["inputs"],), dynamic_shapes=({0: Dim.DYNAMIC},))
    found = collect(program, data, 2, loss="cross_entropy", seed=0, weights=True)
    assert list(found.weights) == ["one.weight"]
    options = {"method": "fisher_unstructured", "sparsity": 0.5}
    made = zero_layers(layers(program), tensors(program), options, None, found.moments())
    assert {name: weight.method for name, weight in made.weights.items()} == {
        "one.weight": "fisher_unstructured",
        "frozen": "magnitude_unstructured",
    }


def test_numbers_that_are_none_and_methods_without_data_are_told() -> None:
    moments = collected(DATA, 4).moments()
    broken = moments["0.weight"].mean_square.clone().fill_(torch.inf)
    moments["0.weight"] = WeightMoments(mean=broken, mean_square=broken)
    with pytest.raises(MethodError, match=r"0\.weight: scores of its weights are not finite"):
        zeroed(moments, method="fisher_unstructured")
    with pytest.raises(MethodError, match="looks at gradients, of a program with data; without data take"):
        start({"method": "fisher_unstructured", "sparsity": 0.5}, "F32", (4, 4))
    with pytest.raises(MethodError, match="looks at what layers read, of a model with data"):
        start({"method": "wanda", "sparsity": 0.5}, "F32", (4, 4))
