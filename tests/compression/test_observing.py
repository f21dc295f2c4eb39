"""Input rows that count as much as the squared gradients of what is made of them, against hooks on the module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

from fleetpress.compression import observing
from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.errors import DataMismatchError, MethodError
from fleetpress.compression.observing import calibrate
from fleetpress.compression.quantization.weight import to_rows

Exported = Callable[[str, bool], tuple[nn.Module, ExportedProgram]]
SAMPLES = 6
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


class _Crossed(nn.Module):
    """`a` and `b` read the same two tensors, in another order than these are made in; `c` reads one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c = (
            nn.Linear(5, 4),
            nn.Linear(4, 3),
            nn.Linear(4, 3),
            nn.Linear(4, 3),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        one = self.first(inputs).tanh()
        two = one.roll(1, -1).sin()
        later, sooner = self.a(two).exp(), self.a(one)
        return later * self.b(two) + sooner * self.b(one) + self.c(one)


def _program(net: nn.Module, example: Tensor) -> ExportedProgram:
    return export(net.eval(), (example[:2],), dynamic_shapes=({0: Dim("batch")},))


def _important(net: nn.Module, x: Tensor, batch_size: int = 4) -> CalibrationStatistics:
    arrays = {"inputs": x, "targets": TARGETS[: len(x)]}
    return calibrate(_program(net, x), arrays, batch_size, loss="cross_entropy", by_importance=True)


def _seen(net: nn.Module, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """By the name of a layer, for each of its calls: its input, its output, the gradient of the summed loss there."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str, read: Tensor, made: Tensor) -> None:
        calls.setdefault(name, []).append((read, made))

    hooks = [
        layer.register_forward_hook(lambda _, read, made, name=name: keep(name, read[0], made))
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    loss = functional.cross_entropy(net(x), TARGETS[: len(x)], reduction="sum")
    flat = [made for some in calls.values() for _, made in some]
    gradients = iter(torch.autograd.grad(loss, flat))
    for hook in hooks:
        hook.remove()
    return {
        name: [(read.detach(), made.detach(), next(gradients)) for read, made in some]
        for name, some in calls.items()
    }


def test_rows_of_linear_layers_count_as_the_gradients_behind_them() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(SAMPLES, 5)
    found = _important(net, x)
    for name, ((read, _, gradient),) in _seen(net, x).items():
        inputs, rows = found.weights[f"{name}.weight"].inputs, read.double()
        importance = gradient.double().square().sum(1)
        assert inputs.rows == SAMPLES
        assert inputs.importance is not None
        torch.testing.assert_close(inputs.importance, importance.sum()[None])
        gram = rows.T @ (rows * importance[:, None])
        torch.testing.assert_close(inputs.gram[0, 0].double(), gram, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(inputs.squares[0], gram.diagonal(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(inputs.mean[0], importance @ rows / importance.sum(), rtol=1e-5, atol=1e-7)
        assert inputs.range.tolist() == [float(read.min()), float(read.max())]
        assert inputs.histogram is not None
        assert int(inputs.histogram.sum()) == read.numel(), "ranges are those of all entries alike"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2)},
        {"dilation": (2, 1), "padding": (1, 2)},
        {"padding": "same"},
        {"groups": 2, "stride": 2},
    ],
)
@pytest.mark.parametrize("most", [256, 5])
def test_rows_of_convolutions_count_as_the_gradients_behind_them(
    options: dict[str, object], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the weight makes of the sum of its rows is the sum of its outputs, each times its row's importance."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 5), bias=False, **options)  # type: ignore[arg-type]
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    x = torch.randn(SAMPLES, 4, 7, 8)
    monkeypatch.setattr(observing, "_POSITIONS", most)
    monkeypatch.setattr(observing, "_PIECE_ELEMENTS", 700)  # rows come in several pieces
    inputs = _important(net, x).weights["0.weight"].inputs
    ((_, made, gradient),) = _seen(net, x)["0"]
    places = made.shape[2:].numel()
    chosen = torch.arange(min(places, most)) * places // min(places, most)
    outputs = made.double().reshape(SAMPLES, inputs.groups, -1, places)[..., chosen]
    squares = gradient.double().reshape((*outputs.shape[:3], places))[..., chosen].square().sum(2)
    expected = (outputs * squares.unsqueeze(2)).sum((0, 3)).flatten()
    rows = to_rows(conv.weight.detach(), 0).double().chunk(inputs.groups)
    mine = torch.cat([part @ total for part, total in zip(rows, inputs.total, strict=True)])
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-8)
    assert inputs.importance is not None
    torch.testing.assert_close(inputs.importance, squares.sum((0, 2)))


def test_what_several_weights_read_counts_for_all_of_them() -> None:
    torch.manual_seed(0)
    net, x = _Crossed(), torch.randn(SAMPLES, 5)
    found, seen = _important(net, x).weights, _seen(net, x)
    assert found["a.weight"].inputs is found["b.weight"].inputs
    assert found["c.weight"].inputs is not found["a.weight"].inputs
    total = torch.zeros(4, dtype=torch.float64)
    for (read, _, mine), (same, _, other) in zip(seen["a"], seen["b"], strict=True):
        assert torch.equal(read, same)
        importance = mine.double().square().sum(1) + other.double().square().sum(1)
        total += importance @ read.double()
    torch.testing.assert_close(found["a.weight"].inputs.total[0], total, rtol=1e-5, atol=1e-7)


def test_importance_is_that_of_all_outputs_of_any_architecture(
    architecture: str, architectures: dict[str, Any], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read counts for as much as all that is made of it, unit by unit, whoever reads it."""
    monkeypatch.setattr(observing, "_POSITIONS", 1 << 20)
    _, program = exported(architecture, True)
    arrays = {"inputs": architectures[architecture].inputs(3)}
    found = calibrate(program, arrays, 2, loss="distillation", by_importance=True).weights
    plain = calibrate(program, arrays, 2).weights
    made: dict[int, list[Tensor]] = {}
    for name, item in found.items():
        assert item.inputs.rows == plain[name].inputs.rows
        assert torch.equal(item.inputs.range, plain[name].inputs.range)
        if item.output_squares is not None:
            made.setdefault(id(item.inputs), []).append(item.output_squares.sum())
    assert made
    for item in found.values():
        if item.output_squares is not None:
            assert item.inputs.importance is not None
            whole = torch.stack(made[id(item.inputs)]).sum()
            torch.testing.assert_close(item.inputs.importance.sum(), whole, rtol=1e-5, atol=0)


def test_batches_and_parts_add_up_to_the_whole_and_survive_a_file() -> None:
    torch.manual_seed(0)
    net, x = _Crossed(), torch.randn(SAMPLES, 5)
    program = _program(net, x)
    whole = _important(net, x, SAMPLES)
    parts = [
        calibrate(
            program,
            {"inputs": x[at], "targets": TARGETS[at]},
            2,
            loss="cross_entropy",
            by_importance=True,
        )
        for at in (slice(0, 4), slice(4, 6))
    ]
    for merged in (
        parts[0].merge(parts[1]),
        CalibrationStatistics.summed([part.to_tensors() for part in parts]),
    ):
        for name, item in whole.weights.items():
            other = merged.weights[name].inputs
            torch.testing.assert_close(other.gram, item.inputs.gram, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(other.mean, item.inputs.mean)
            torch.testing.assert_close(other.importance, item.inputs.importance)


def test_rows_of_recurrent_layers_count_alike() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            scores: Tensor = self.head(self.lstm(inputs)[0][:, -1])
            return scores

    found = _important(Net(), torch.randn(SAMPLES, 7, 5)).weights
    assert found["lstm.weight_ih_l0"].inputs.importance is None
    assert found["lstm.weight_ih_l0"].inputs.rows == 7 * SAMPLES
    assert found["head.weight"].inputs.importance is not None


def test_what_nothing_depends_on_has_no_importance_and_no_mean() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.zeros_(net[2].weight)
    inputs = _important(net, torch.randn(SAMPLES, 5)).weights["0.weight"].inputs
    assert inputs.importance is not None
    assert inputs.importance.tolist() == [0.0]
    assert inputs.mean.tolist() == [[0.0] * 5]
    assert inputs.root_mean_square.isfinite().all()


def test_statistics_of_one_kind_alone_are_merged() -> None:
    net, x = nn.Linear(5, 3), torch.randn(SAMPLES, 5)
    plain = calibrate(_program(net, x), {"inputs": x}, 4)
    with pytest.raises(DataMismatchError, match="cannot be merged"):
        plain.weights["weight"].inputs.merge(_important(net, x).weights["weight"].inputs)


def test_importance_is_that_for_a_loss() -> None:
    net, x = nn.Linear(5, 3), torch.randn(SAMPLES, 5)
    with pytest.raises(MethodError, match="name one"):
        calibrate(_program(net, x), {"inputs": x}, 4, by_importance=True)
