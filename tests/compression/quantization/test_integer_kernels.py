"""Layers whose inputs are integers, too: the program computes what the formula says, on ATen's integer product."""

import io
import warnings
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.cost import macs, parameters
from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, integer_layers, quantize_weight
from fleetpress.compression.quantization.activations import input_grid
from fleetpress.compression.quantization.integer_layers import IntegerLayers
from fleetpress.compression.quantization.packed_program import pack_program, unpack_program
from fleetpress.compression.scheme import SCHEMES, bits_per_weight
from fleetpress.storage.programs import load_program, save_program

aten = torch.ops.aten
W8A8 = SCHEMES["W8A8"]


class Tokens(nn.Module):
    """Linear layers over [batch, tokens, columns]; two read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(24, 16), nn.Linear(24, 16, bias=False)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.query(x) + self.key(x)))


class Products(nn.Module):
    """Products whose output units lie along the weight's second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(12, 10)), nn.Parameter(torch.randn(10, 7))
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, torch.tanh(x @ self.first), self.second)


class Pictures(nn.Module):
    """Convolutions of every form that has an integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 0))
        self.same = nn.Conv2d(8, 6, (2, 3), padding="same", bias=False)
        self.point = nn.Conv2d(6, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(torch.relu(self.same(torch.relu(self.wide(x)))))


class Sounds(nn.Module):
    """A convolution over one dimension, and its flattened outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


SHAPES = {Tokens: (6, 24), Products: (12,), Pictures: (3, 9, 11), Sounds: (4, 9)}
CASES = [(net, torch.float32) for net in SHAPES] + [(Tokens, torch.bfloat16), (Sounds, torch.float16)]


def example(net: type[nn.Module], batch: int = 4, seed: int = 9) -> Tensor:
    return torch.randn(batch, *SHAPES[net], generator=torch.Generator().manual_seed(seed))


@cache
def exported(net: type[nn.Module], dtype: torch.dtype = torch.float32) -> ExportedProgram:
    torch.manual_seed(0)
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if net is Tokens else {0: Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # padding="same" may copy, which torch mentions
        return torch.export.export(
            net().to(dtype).eval(), (example(net).to(dtype),), dynamic_shapes=(dynamic,)
        )


def quantized_of(
    program: ExportedProgram, net: type[nn.Module], method: str = "round_to_nearest"
) -> dict[str, QuantizedWeight]:
    observed = calibrate(program, {"x": example(net, 16)}, 8).weights
    values = tensors(program)
    return {
        name: quantize_weight(
            name, values[name], layer.axis, W8A8, QUANTIZERS[method], statistics=observed[name]
        )
        for layer in layers(program)
        for name in layer.weights
    }


def by_the_formula(program: ExportedProgram, quantized: dict[str, QuantizedWeight]) -> torch.fx.GraphModule:
    """The program with inputs rounded to their grids and weights dequantized, all in floats."""
    module = program.module()
    stored = dict(quantized)
    for node in list(module.graph.nodes):
        weight = next((stored[str(a.target)] for a in node.all_input_nodes if str(a.target) in stored), None)
        if node.op != "call_function" or weight is None:
            continue
        scale, zero = weight.input_scale, weight.input_zero_point
        place = 1 if node.target is aten.addmm.default else 0
        with module.graph.inserting_before(node):
            codes = module.graph.call_function(
                lambda x, s=scale, z=zero: (
                    ((x.float() / s + z).round().clamp(-128, 127) - z).mul(s).to(x.dtype)
                ),
                (node.args[place],),
            )
        node.args = (*node.args[:place], codes, *node.args[place + 1 :])
    module.recompile()
    module.load_state_dict({name: weight.dequantize() for name, weight in stored.items()}, strict=False)
    return module


@pytest.mark.parametrize(("net", "dtype"), CASES)
def test_the_program_computes_the_formula_and_loads_without_this_package(
    net: type[nn.Module], dtype: torch.dtype
) -> None:
    program = exported(net, dtype)
    quantized = quantized_of(program, net)
    data = save_program(pack_program(program, quantized))
    plain, safe = torch.export.load(io.BytesIO(data)), load_program(data)
    assert sum(node.target is aten._int_mm.default for node in plain.graph.nodes) == len(quantized)
    assert not any(
        node.target in (aten.linear.default, aten.conv2d.default, aten.conv1d.default, aten.matmul.default)
        for node in plain.graph.nodes
    )
    reference = by_the_formula(program, quantized)
    plainly, safely = plain.module(), safe.module()
    for batch in (1, 3):
        inputs = example(net, batch, seed=batch).to(dtype)
        expected = reference(inputs)
        found = plainly(inputs)
        assert torch.equal(found, safely(inputs))
        assert found.dtype == dtype
        error = (found - expected).abs().max() / expected.abs().max()
        # Sums of floats round; a half may become the other neighbour on the way through another layer.
        assert float(error) < (0.02 if dtype == torch.float32 else 0.05)


def test_one_layer_is_exact() -> None:
    """With whole numbers for scales nothing rounds: the kernel's sums are those of the integers."""
    torch.manual_seed(3)
    layer = nn.Linear(40, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, (8, 40)))
        layer.bias.copy_(torch.randint(-9, 9, (8,)))
    codes = (layer.weight.detach() + 128).to(torch.uint8)
    weight = QuantizedWeight(
        codes=codes,
        scale=torch.ones(8, 1),
        zero_point=None,
        scheme=W8A8,
        shape=(8, 40),
        input_scale=2.0,
        input_zero_point=5,
    )
    inputs = 2.0 * torch.randint(-133, 123, (64, 40))
    program = torch.export.export(layer.eval(), (inputs,))
    found = pack_program(program, {"weight": weight}).module()(inputs)
    assert torch.equal(found, layer(inputs))


@pytest.mark.parametrize(("net", "dtype"), CASES)
def test_folding_gives_the_float_program_back(net: type[nn.Module], dtype: torch.dtype) -> None:
    program = exported(net, dtype)
    quantized = quantized_of(program, net)
    saved = load_program(save_program(pack_program(program, quantized)))
    folded = load_program(save_program(unpack_program(saved)))
    values = tensors(folded)
    assert {name: (value.shape, value.dtype) for name, value in values.items()} == {
        name: (value.shape, value.dtype) for name, value in tensors(program).items()
    }
    assert all(torch.equal(values[name], weight.dequantize()) for name, weight in quantized.items())
    assert not any(
        node.target in (aten._int_mm.default, aten.round.default, aten.sym_size.int)
        for node in folded.graph.nodes
    )
    assert macs(folded) == macs(program) == macs(saved)
    assert parameters(folded) == parameters(program)
    reference = program.module()
    reference.load_state_dict({name: weight.dequantize() for name, weight in quantized.items()}, strict=False)
    inputs = example(net, 3).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert torch.allclose(folded.module()(inputs), reference(inputs), atol=tolerance)
    kept = unpack_program(saved, keep_integers=True)
    assert torch.equal(kept.module()(inputs), saved.module()(inputs))


def test_stored_bytes_are_as_predicted() -> None:
    program = exported(Pictures)
    quantized = quantized_of(program, Pictures)
    stored = tensors(pack_program(program, quantized))
    for name, weight in quantized.items():
        real = sum(stored[name + part].nbytes for part in ("_int8", "_scale", "_offset"))
        told = bits_per_weight(W8A8, weight.shape, 32) * weight.codes.numel() / 8
        assert real == weight.stored_bytes() == round(told, 6)
    golden = quantized["point.weight"]
    signed = golden.codes.to(torch.int16).sub(128).to(torch.int8)
    assert stored["point.weight_int8"].equal(signed)
    wide = stored["wide.weight_int8"].view(8, 3, 5, 3).movedim(-1, 1)
    assert wide.equal(quantized["wide.weight"].codes.view(8, 3, 3, 5).to(torch.int16).sub(128).to(torch.int8))


def test_what_several_layers_read_is_rounded_once() -> None:
    program = exported(Tokens)
    packed = pack_program(program, quantized_of(program, Tokens))
    assert sum(node.target is aten.round.default for node in packed.graph.nodes) == 2


def seen(values: Tensor) -> InputStatistics:
    counts = torch.bincount((values.view(torch.int32) >> 20) & 0xFFF, minlength=4096)
    return InputStatistics(
        rows=len(values),
        total=torch.zeros(1, 1),
        squares=torch.zeros(1, 1),
        gram=torch.zeros(1, 1, 1, 1),
        range=torch.stack([values.amin(), values.amax()]),
        histogram=counts,
    )


@pytest.mark.parametrize(
    ("values", "scale", "zero_point"),
    [
        ([0.0, 25.5], 0.1, -128),
        ([-1.0, 1.55], 0.01, -28),
        ([3.0, 25.5], 0.1, -128),  # zero is always representable
        ([-25.5, -3.0], 0.1, 127),
        ([0.0, 0.0], 1.0, 0),
    ],
)
def test_a_grid_holds_the_range_and_zero(values: list[float], scale: float, zero_point: int) -> None:
    found = input_grid(seen(torch.tensor(values)), narrowed=False)
    assert found == (pytest.approx(scale, rel=1e-6), zero_point)


def test_a_narrowed_grid_has_the_smaller_error() -> None:
    values = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1)) - 0.3
    values[0] = 100.0  # an outlier that costs all others their digits

    def error(narrowed: bool) -> float:
        scale, zero = input_grid(seen(values), narrowed=narrowed)
        return float(
            ((((values / scale + zero).round().clamp(-128, 127) - zero) * scale - values) ** 2).mean()
        )

    def error_up_to(top: float) -> float:
        scale = (top + 0.3) / 255
        zero = round(-128 + 0.3 / scale)
        back = (((values / scale + zero).round().clamp(-128, 127)) - zero) * scale
        return float((back - values).square().mean())

    best = min(error_up_to(100.0 * step / 20) for step in range(1, 21))
    assert error(narrowed=True) < 0.7 * error(narrowed=False)
    assert error(narrowed=True) < 1.05 * best


def test_histograms_of_parts_add_up() -> None:
    program = exported(Tokens)
    whole = calibrate(program, {"x": example(Tokens, 8)}, 8)
    parts = [calibrate(program, {"x": example(Tokens, 8)[at : at + 4]}, 4) for at in (0, 4)]
    merged = parts[0].merge(parts[1])
    merged = type(merged).from_tensors(merged.to_tensors())
    for name, item in whole.weights.items():
        assert item.inputs.histogram is not None
        assert torch.equal(item.inputs.histogram, merged.weights[name].inputs.histogram)
        assert int(item.inputs.histogram.sum()) == item.inputs.rows * item.inputs.columns


class Mixed(nn.Module):
    """Layers with and without an integer kernel that would gain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 512)
        self.big = nn.Linear(512, 512)
        self.small = nn.Linear(512, 4)
        self.twice = nn.Linear(512, 512, bias=False)
        self.twice.weight = self.embed.weight
        self.rnn = nn.LSTM(512, 8, batch_first=True)
        self.grouped = nn.Conv1d(512, 512, 3, groups=2)
        self.dilated = nn.Conv1d(512, 512, 3, dilation=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.big(self.embed(x))
        z = y.transpose(1, 2)
        return self.small(y), self.twice(y), self.rnn(y)[0], self.grouped(z), self.dilated(z)


def test_layers_that_would_not_gain_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Mixed().eval(), (torch.zeros(2, 8, dtype=torch.int64),))
    known = IntegerLayers(program)
    reasons = {
        layer.name: known.reason_against(layer) for layer in layers(program) if layer.kind != "Embedding"
    }
    assert reasons == {
        "big": None,
        "small": "it is too small to gain from an integer kernel",
        "twice": "its weight is used elsewhere, too",
        "rnn": "a LSTM layer has no integer kernel",
        "grouped": "a convolution with groups has no integer kernel",
        "dilated": "its convolution is of an unusual form",
    }


def test_sums_that_may_overflow_stay_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_layers, "_MOST_COLUMNS", 23)
    program = exported(Tokens)
    known = IntegerLayers(program)
    assert "may overflow" in str(known.reason_against(layers(program)[0]))
    double = exported(Products, torch.float64)
    assert "float64" in str(IntegerLayers(double).reason_against(layers(double)[0]))


def test_inputs_must_have_been_seen() -> None:
    with pytest.raises(QuantizationError, match=r"^w: its inputs were not observed"):
        quantize_weight("w", torch.ones(2, 3), 0, W8A8, QUANTIZERS["round_to_nearest"])
    statistics = WeightStatistics(inputs=seen(torch.tensor([0.0, 1.0])))
    found = quantize_weight(
        "w", torch.ones(2, 3), 0, W8A8, QUANTIZERS["round_to_nearest"], statistics=statistics
    )
    assert found.input_scale == pytest.approx(1 / 255)
