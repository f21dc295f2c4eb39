"""Scores of taylor, fisher and wanda, against torch-pruning and against what they stand for."""

from collections.abc import Callable

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import PRUNERS, find_units
from fleetpress.compression.pruning.method import ScoreContext
from fleetpress.compression.training import TrainOptions, collect, train

SAMPLES = 12
IMAGES = torch.randn(SAMPLES, 2, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(SAMPLES) % 3
DATA = {"inputs": IMAGES, "targets": LABELS}


def plain() -> nn.Module:
    """No biases and no normalization: there torch-pruning's unit is the same rows as ours."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 3, bias=False),
    ).eval()


def normalized() -> nn.Module:
    """A convolution behind which a batch normalization stands."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()


def program_of(model: nn.Module) -> ExportedProgram:
    return export(model, (IMAGES[:2],), dynamic_shapes=({0: Dim.AUTO},))


def scores(model: nn.Module, method: str, batch_size: int = SAMPLES) -> dict[str, Tensor]:
    """By group, with statistics at fixed weights."""
    program = program_of(model)
    found = collect(program, DATA, batch_size, loss="cross_entropy", seed=0, products=True)
    observed = calibrate(program, DATA, batch_size)
    units = find_units(program)
    context = ScoreContext(
        values=tensors(program),
        layers=units.layers,
        statistics=found.neurons(),
        seed=0,
        inputs={name: item.inputs for name, item in observed.weights.items()},
    )
    return {group.name: PRUNERS[method].score(context, group) for group in units.groups}


def theirs(model: nn.Module, importance: Callable[..., Tensor]) -> dict[str, Tensor]:
    """torch-pruning's importance of the output channels of every layer but the last."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=IMAGES[:2])
    found = {}
    for name in ("0", "3"):
        layer = model.get_submodule(name)
        prune = (
            torch_pruning.prune_conv_out_channels
            if isinstance(layer, nn.Conv2d)
            else torch_pruning.prune_linear_out_channels
        )
        group = graph.get_pruning_group(layer, prune, idxs=list(range(len(layer.weight))))
        found[name] = importance(group)
    return found


def test_taylor_is_the_square_of_torch_pruning_s_on_one_batch() -> None:
    model = plain()
    functional.cross_entropy(model(IMAGES), LABELS).backward()
    importance = torch_pruning.importance.GroupTaylorImportance(
        multivariable=True, group_reduction="first", normalizer=None
    )
    for name, wanted in theirs(model, importance).items():
        got = scores(model, "taylor")[name]
        torch.testing.assert_close(got.sqrt(), wanted.double(), rtol=1e-4, atol=1e-7)
        assert torch.equal(got.argsort(), wanted.argsort())


def test_fisher_is_half_of_torch_pruning_s_hessian_on_one_batch() -> None:
    model = plain()
    importance = torch_pruning.importance.GroupHessianImportance(group_reduction="first", normalizer=None)
    functional.cross_entropy(model(IMAGES), LABELS).backward()
    importance.accumulate_grad(model)
    for name, wanted in theirs(model, importance).items():
        got = scores(model, "fisher")[name]
        torch.testing.assert_close(2 * got, wanted.double(), rtol=1e-4, atol=1e-9)
        assert torch.equal(got.argsort(), wanted.argsort())


@pytest.mark.parametrize("make", [plain, normalized])
def test_taylor_is_the_mean_squared_gradient_by_a_gate_over_the_batches(
    make: Callable[[], nn.Module],
) -> None:
    model, at = make(), 0 if make is plain else 1  # the gate stands behind the normalization
    squares = torch.zeros(6, dtype=torch.float64)
    for start in range(0, SAMPLES, 4):
        gate = torch.ones(6, requires_grad=True)
        hidden = model[: at + 1](IMAGES[start : start + 4]) * gate[:, None, None]
        functional.cross_entropy(model[at + 1 :](hidden), LABELS[start : start + 4]).backward()
        assert gate.grad is not None
        squares += gate.grad.double().square() / 3
    torch.testing.assert_close(scores(model, "taylor", 4)["0"], squares, rtol=1e-4, atol=1e-9)


def test_taylor_of_a_training_run_tells_units_apart_in_front_of_a_batch_normalization() -> None:
    """Their own weights would not: in train mode the loss does not change with their length."""
    program = program_of(normalized())
    options = TrainOptions(batch_size=4, lr=1e-4)
    found = train(
        program, DATA, options, loss="cross_entropy", seed=0, collect=True, products=True
    ).statistics
    assert found is not None
    gates = found.neurons()["0"].gate_square
    assert gates is not None
    assert float(gates.min()) > 1e-6


def test_wanda_is_the_weight_times_the_strength_of_its_input() -> None:
    model = plain()
    with torch.no_grad():
        read = {"0": functional.unfold(IMAGES, 3).movedim(1, 2).flatten(0, 1), "3": model[:3](IMAGES)}
    for name, rows in read.items():
        strength = rows.double().square().mean(0).sqrt()
        wanted = (model.get_submodule(name).weight.flatten(1).double().abs() * strength).sum(1)
        torch.testing.assert_close(scores(model, "wanda_structured")[name], wanted, rtol=1e-5, atol=0)


def test_wanda_of_groups_takes_each_group_s_own_inputs() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 8, 1, groups=2, bias=False)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), grouped, nn.Flatten(), nn.Linear(288, 3)).eval()
    with torch.no_grad():
        strength = model[:2](IMAGES).movedim(1, -1).flatten(0, -2).double().square().mean(0).sqrt()
    rows = (grouped.weight.flatten(1).double().abs() * strength.view(2, 2).repeat_interleave(4, 0)).sum(1)
    # A unit is the same place of both groups.
    torch.testing.assert_close(
        scores(model, "wanda_structured")["2"], rows.view(2, 4).sum(0), rtol=1e-5, atol=0
    )
