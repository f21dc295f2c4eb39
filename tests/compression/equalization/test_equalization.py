"""Equalization: the program computes what it did, and what is quantized afterwards loses less."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.equalization import EQUALIZERS, Equalization, equalize
from fleetpress.compression.equalization.pairs import places
from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.scheme import QuantScheme, resolve

WIDTH, HEADS = 16, 4
W3 = resolve(num_bits=3, strategy="channel")


class Block(nn.Module):
    """A transformer block whose norms come first: norm -> q, k, v; v -> o; norm -> fc1; fc1 -> ReLU -> fc2."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, *, eager: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH, bias=False)
        self.eager = eager

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm1(inputs)
        split = [part(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in (self.q, self.k, self.v)]
        if self.eager:
            weights = (split[0] @ split[1].transpose(2, 3)).softmax(-1)
            seen = weights @ split[2]
        else:
            seen = functional.scaled_dot_product_attention(*split)
            seen = seen.reshape(x.shape[0], HEADS, -1, WIDTH // HEADS)  # nothing changes: BERT's does this
        x = inputs + self.o(seen.transpose(1, 2).reshape(*x.shape))
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


class Net(nn.Module):
    """Convolutions with ReLU, pooling and flattened maps between them, a batch norm, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.bn, self.c3 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.fc1, self.fc2 = nn.Linear(4 * 2 * 2, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.c2(functional.max_pool2d(torch.relu(self.c1(inputs)), 2))
        x = torch.relu(self.c3(functional.leaky_relu(self.bn(x), 0.1)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """Nothing can be scaled: every tensor has a reader that is no layer, or goes through GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(inputs)
        return x + self.b(functional.gelu(self.a(x)))


class Twice(nn.Module):
    """Two layers share one weight, a third runs twice: neither may be scaled for one of its uses alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, inputs: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(inputs))))
        return torch.relu(self.c(torch.relu(self.c(x))))


def program_of(net: nn.Module, x: Tensor) -> ExportedProgram:
    torch.manual_seed(1)
    for name, value in net.named_parameters():
        value.data = torch.randn(value.shape) * 0.3 + (1 if "norm" in name or "bn" in name else 0)
    for name, value in net.named_buffers():
        if name.endswith("running_var"):
            value.data = torch.rand(value.shape) + 0.5
    return export(net.eval(), (x[:2],), dynamic_shapes=({0: Dim("batch")},))


def sequence() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(24, 5, WIDTH) * torch.logspace(0, 1, WIDTH)


def images() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(24, 2, 8, 8)


def names(program: ExportedProgram) -> set[tuple[str, ...]]:
    """The producer and the readers of every place."""

    def layer(weight: str) -> str:
        return weight.removesuffix(".weight")

    return {
        (layer(place.producers[0][0]), *sorted(layer(reader.weight) for reader in place.readers))
        for place in places(program)
    }


CASES = {
    "block": (Block(), sequence()),
    "eager block": (Block(eager=True), sequence()),
    "rms block": (Block(nn.RMSNorm), sequence()),
    "convolutions": (Net(), images()),
}


def test_places() -> None:
    for case in ("block", "eager block", "rms block"):
        found = names(program_of(*CASES[case]))
        assert found == {("norm1", "k", "q", "v"), ("v", "o"), ("norm2", "fc1"), ("fc1", "fc2")}, case
    assert names(program_of(*CASES["convolutions"])) == {
        ("c1", "c2"),
        ("bn", "c3"),
        ("c3", "fc1"),
        ("fc1", "fc2"),
    }
    assert names(program_of(Residual(), sequence())) == set()
    assert names(program_of(Twice(), sequence())) == set()


def schemes(program: ExportedProgram, scheme: QuantScheme) -> dict[str, QuantScheme]:
    return {name: scheme for layer in layers(program) for name in layer.weights}


def equalized(
    program: ExportedProgram, method: str, scheme: QuantScheme, x: Tensor
) -> tuple[ExportedProgram, Equalization, CalibrationStatistics]:
    statistics = calibrate(program, {"inputs": x}, 8)
    found = equalize(program, EQUALIZERS[method], schemes(program, scheme), statistics.weights)
    return with_tensors(program, found.tensors), found, statistics


@pytest.mark.parametrize("method", EQUALIZERS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_stay_and_statistics_follow(case: str, method: str) -> None:
    net, x = CASES[case]
    program = program_of(net, x)
    after, found, statistics = equalized(program, method, W3, x)
    assert found.tensors
    assert any(
        not torch.allclose(value, tensors(program)[name], rtol=0.05) for name, value in found.tensors.items()
    )
    torch.testing.assert_close(after.module()(x), program.module()(x), rtol=1e-4, atol=1e-4)
    mine, seen = found.rescaled(statistics), calibrate(after, {"inputs": x}, 8)
    for name, expected in seen.weights.items():
        got = mine.weights[name].inputs
        scale = float(expected.inputs.gram.abs().max())
        torch.testing.assert_close(got.gram, expected.inputs.gram, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(got.squares, expected.inputs.squares, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(got.total, expected.inputs.total, rtol=1e-3, atol=1e-3 * abs(scale) ** 0.5)
        assert float(got.range[0]) <= float(expected.inputs.range[0]) + 1e-4
        assert float(got.range[1]) >= float(expected.inputs.range[1]) - 1e-4


def test_gradients_of_outputs_follow() -> None:
    net, x = CASES["block"]
    program = program_of(net, x)
    data = {"inputs": x, "targets": torch.zeros_like(x)}
    before = calibrate(program, data, 8, loss="mse")
    found = equalize(program, EQUALIZERS["cross_layer"], schemes(program, W3))
    after = calibrate(with_tensors(program, found.tensors), data, 8, loss="mse")
    mine = found.rescaled(before)
    for name, expected in after.weights.items():
        squares = mine.weights[name].output_squares
        assert squares is not None
        assert expected.output_squares is not None
        torch.testing.assert_close(squares, expected.output_squares, rtol=2e-3, atol=1e-9)


def test_cross_layer_makes_ranges_equal() -> None:
    program = program_of(*CASES["convolutions"])
    found = equalize(program, EQUALIZERS["cross_layer"], schemes(program, W3)).tensors
    ahead = found["c1.weight"].abs().amax((1, 2, 3))
    behind = found["c2.weight"].abs().amax((0, 2, 3))
    torch.testing.assert_close(ahead, behind, rtol=1e-2, atol=0)
    assert "bn.weight" not in found


def test_activation_aware_scaling_lowers_the_error_of_rounding() -> None:
    net, x = CASES["block"]
    program = program_of(net, x)
    after, _, _ = equalized(program, "activation_aware", W3, x)
    exact = program.module()(x)

    def error(target: ExportedProgram) -> float:
        values = tensors(target)
        rounded = {}
        for layer in layers(target):
            weights = quantize_layer(layer, values, W3, QUANTIZERS["round_to_nearest"])
            rounded |= {name: item.dequantize() for name, item in weights.items()}
        return float((with_tensors(target, rounded).module()(x) - exact).detach().square().mean())

    assert error(after) < 0.7 * error(program)


def test_weights_that_are_not_quantized_have_no_say() -> None:
    net, x = CASES["block"]
    program = program_of(net, x)
    statistics = calibrate(program, {"inputs": x}, 8).weights
    some = {"o.weight": W3}
    found = equalize(program, EQUALIZERS["activation_aware"], some, statistics)
    assert set(found.inputs) <= {"o.weight"}
    assert equalize(program, EQUALIZERS["activation_aware"], {}, statistics).tensors == {}
