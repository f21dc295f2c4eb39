"""Statistics of what layers see, against what hooks on the module see, for every way that weights are used."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

from fleetpress.compression import observing
from fleetpress.compression.calibration import CalibrationStatistics, block_columns, products_bytes
from fleetpress.compression.observing import calibrate
from fleetpress.compression.quantization.weight import to_rows

SAMPLES = 6


class _Shared(nn.Module):
    """Three weights read one tensor; one of them is used a second time on another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        again = torch.relu(self.c(inputs))
        return self.a(inputs) + self.b(inputs) + self.a(again)


def _program(net: nn.Module, example: Tensor) -> ExportedProgram:
    return export(net.eval(), (example[:2],), dynamic_shapes=({0: Dim("batch")},))


def _conv(**options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, (3, 5), **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # type: ignore[arg-type]
    return nn.Sequential(net, nn.Linear(6, 3)), torch.randn(SAMPLES, 4, 7, 8)


def test_inputs_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(SAMPLES, 3, 5)
    found = calibrate(_program(net, x), {"inputs": x}, 4)
    rows = x.reshape(-1, 5).double()
    inputs = found.weights["0.weight"].inputs
    assert (inputs.rows, found.samples) == (3 * SAMPLES, SAMPLES)
    torch.testing.assert_close(inputs.gram[0, 0].double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs.mean[0], rows.mean(0))
    torch.testing.assert_close(inputs.root_mean_square[0], rows.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)
    assert inputs.range.tolist() == [float(x.min()), float(x.max())]
    assert found.weights["0.weight"].output_squares is None


@pytest.mark.parametrize("loss", [None, "distillation"])
def test_programs_of_doubles_have_statistics_too(loss: str | None) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Linear(5, 2)), torch.randn(SAMPLES, 3, 7)
    single = calibrate(_program(net, x), {"inputs": x}, 4, loss=loss)
    double = calibrate(_program(net.double(), x.double()), {"inputs": x}, 4, loss=loss)
    for name, known in single.weights.items():
        torch.testing.assert_close(double.weights[name].inputs.gram, known.inputs.gram, rtol=1e-5, atol=1e-5)
        if loss is not None:
            assert double.weights[name].output_squares is not None


def test_input_rows_times_the_weight_are_the_outputs() -> None:
    """x of conv options: mean outputs follow from mean inputs, whatever stride, padding, dilation, groups."""
    for options in (
        {},
        {"stride": (2, 1), "padding": (1, 2)},
        {"dilation": (2, 1), "padding": (1, 2)},
        {"padding": "same"},
        {"groups": 2, "stride": 2},
    ):
        net, x = _conv(**options)
        found = calibrate(_program(net, x), {"inputs": x}, 4).weights["0.0.weight"].inputs
        conv = net[0][0]  # type: ignore[index]
        expected = functional.conv2d(
            x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        ).mean((0, 2, 3))
        rows = to_rows(conv.weight.detach(), 0).double().chunk(found.groups)
        mine = torch.cat([part @ mean for part, mean in zip(rows, found.mean, strict=True)])
        torch.testing.assert_close(mine, expected.double().detach(), rtol=1e-4, atol=1e-5)


def test_output_squares_are_those_of_every_sample_alone() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(SAMPLES, 5)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    arrays = {"inputs": x, "targets": targets}
    found = calibrate(_program(net, x), arrays, 4, loss="cross_entropy").weights["0.weight"].output_squares
    expected = torch.zeros(4, dtype=torch.float64)
    for sample, target in zip(x, targets, strict=True):
        hidden = net[0](sample)
        loss = functional.cross_entropy(net[2](net[1](hidden)), target)
        expected += torch.autograd.grad(loss, hidden)[0].double().square()
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_drawn_targets_need_none_and_are_the_same_each_time() -> None:
    net, x = _conv()
    program = _program(net, x)
    one, two = (calibrate(program, {"inputs": x}, 4, loss="distillation", seed=3) for _ in range(2))
    for name, item in one.weights.items():
        assert item.output_squares is not None
        assert float(item.output_squares.sum()) > 0
        assert torch.equal(item.output_squares, two.weights[name].output_squares)  # type: ignore[arg-type]


def test_weights_that_read_the_same_share_their_inputs() -> None:
    torch.manual_seed(0)
    net, x = _Shared(), torch.randn(SAMPLES, 5)
    found = calibrate(_program(net, x), {"inputs": x}, 4).weights
    assert found["b.weight"].inputs is found["c.weight"].inputs
    assert found["a.weight"].inputs.rows == 2 * found["b.weight"].inputs.rows
    again = torch.relu(net.c(x)).detach()
    both = torch.cat([x, again]).double()
    torch.testing.assert_close(
        found["a.weight"].inputs.gram[0, 0].double(), both.T @ both, rtol=1e-5, atol=1e-5
    )


def test_parts_merge_to_the_whole_and_survive_a_file() -> None:
    net, x = _conv(padding=1)
    program = _program(net, x)
    whole = calibrate(program, {"inputs": x}, 2, loss="distillation", seed=1)
    parts = [
        calibrate(program, {"inputs": x[at : at + 2]}, 2, loss="distillation", seed=1, first_batch=at // 2)
        for at in range(0, SAMPLES, 2)
    ]
    merged = parts[0].merge(parts[1]).merge(CalibrationStatistics.from_tensors(parts[2].to_tensors()))
    assert merged.samples == whole.samples
    for name, item in whole.weights.items():
        other = merged.weights[name]
        torch.testing.assert_close(other.inputs.gram, item.inputs.gram, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.inputs.total, item.inputs.total)
        assert torch.equal(other.inputs.range, item.inputs.range)
        torch.testing.assert_close(other.output_squares, item.output_squares)


def test_long_rows_keep_as_many_products_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = 4096 + 100
    x = torch.randn(3, columns)
    program = _program(nn.Linear(columns, 300), x)
    assert calibrate(program, {"inputs": x}, 2).weights["weight"].inputs.is_whole
    few = calibrate(_program(nn.Linear(columns, 2), x), {"inputs": x}, 2).weights["weight"].inputs
    assert next(few.blocks())[1].shape == (512, 512), "products are no many times larger than their weight"
    monkeypatch.setattr(observing, "_WIDE_BYTES", 16 << 20)  # 1,024 columns would take 17 MB
    found = calibrate(program, {"inputs": x}, 2).weights["weight"].inputs
    blocks = list(found.blocks())
    assert [at.stop - at.start for at, _ in blocks] == [512] * 8 + [100]
    for at, gram in blocks:
        torch.testing.assert_close(gram, x[:, at].T @ x[:, at], rtol=1e-4, atol=1e-4)


def test_blocks_are_as_large_as_allowed() -> None:
    assert [block_columns(columns) for columns in (7, 4096, 4097, 16384, 16385, 65536)] == [
        7, 4096, 4097, 16384, 2048, 2048,
    ]  # fmt: skip
    most = 256 << 20
    assert [block_columns(columns, most) for columns in (4096, 8192, 8193, 65536, 262144)] == [
        4096, 8192, 4096, 1024, 512,
    ]  # fmt: skip
    assert products_bytes(16384) == 1 << 30
    assert products_bytes(65536) == 32 * 4 * 2048**2
