import io
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.errors import ProgramError
from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_layer
from fleetpress.compression.quantization.packed_program import pack_program, predicted_bytes, unpack_program
from fleetpress.compression.quantization.packing import packed_bytes
from fleetpress.compression.scheme import SCHEMES, QuantScheme, bits_per_weight, resolve
from fleetpress.storage.programs import load_program, save_program


class Convolutions(nn.Module):
    """Plain, grouped and depthwise convolutions and a linear layer, on any batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, bias=False)
        self.head = nn.Linear(12 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.plain(x)))
        return self.head(self.depthwise(self.grouped(x)).flatten(1))


class Transposed(nn.Module):
    """Layers whose output units lie along the weight's second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 3, stride=2)
        self.up_groups = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.mix = nn.Parameter(torch.randn(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.up_groups(self.up(x)) @ self.mix


class Recurrent(nn.Module):
    """LSTM and GRU: their weights are in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(14, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Tied(nn.Module):
    """A tiny language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.body = nn.Linear(24, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


def example(net: type[nn.Module], batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    if net is Tied:
        return torch.randint(0, 50, (batch, 6), generator=generator)
    shape = {Convolutions: (3, 8, 8), Transposed: (3, 4, 4), Recurrent: (3, 5)}[net]
    return torch.randn(batch, *shape, generator=generator)


@cache
def exported(net: type[nn.Module], dtype: torch.dtype = torch.float32) -> ExportedProgram:
    torch.manual_seed(0)
    inputs = example(net)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # recurrent modules keep a list of their weights, which export mentions
        return torch.export.export(net().to(dtype).eval(), (inputs,), dynamic_shapes=({0: Dim.DYNAMIC},))


def quantized_of(program: ExportedProgram, scheme: QuantScheme) -> dict[str, QuantizedWeight]:
    values = tensors(program)
    method = QUANTIZERS["k_means" if scheme.codebook == "learned" else "round_to_nearest"]
    return {
        name: weight
        for layer in layers(program)
        for name, weight in quantize_layer(layer, values, scheme, method).items()
    }


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    return load_program(save_program(program))


CASES = [
    (
        Convolutions,
        torch.float32,
        resolve("W4A16_ASYM", group_size=16),
    ),  # depthwise rows are shorter than a group
    (Convolutions, torch.float16, resolve("W8A16")),
    (Convolutions, torch.float32, resolve("W2A16", group_size=10)),  # no row is a multiple of 10
    (Transposed, torch.float32, resolve("W3A16_ASYM", group_size=4)),
    (Transposed, torch.float64, resolve("W8A16_ASYM")),
    (Recurrent, torch.float32, resolve("W5A16", group_size=7)),
    (Recurrent, torch.float32, resolve("W4A16", strategy="tensor")),
    (Tied, torch.bfloat16, resolve("W6A16_ASYM", group_size=8)),
    (Tied, torch.float16, resolve("W7A16", group_size=5)),
    (Convolutions, torch.float32, SCHEMES["NF4"]),
    (Transposed, torch.float64, resolve("NF4", group_size=4)),
    (Recurrent, torch.float32, SCHEMES["MXFP4"]),
    (Tied, torch.float16, SCHEMES["MXFP4"]),
    (Transposed, torch.float64, SCHEMES["MXFP4"]),
    (Convolutions, torch.float16, SCHEMES["TERNARY"]),
    (Transposed, torch.float32, resolve("TERNARY", group_size=4)),
    (Recurrent, torch.float32, resolve("BINARY", strategy="tensor")),
    (Tied, torch.bfloat16, SCHEMES["BINARY"]),
    (Tied, torch.float16, SCHEMES["FP8"]),
    (Transposed, torch.float64, resolve("FP8", strategy="tensor")),
    (Recurrent, torch.float32, resolve(num_bits=3, learned=True)),
    (Convolutions, torch.float32, resolve(num_bits=4, learned=True, group_size=16)),
    (Convolutions, torch.float32, resolve(num_bits=4, learned=True)),
    (Transposed, torch.float64, resolve(num_bits=2, learned=True, group_size=None)),
    (Tied, torch.bfloat16, resolve(num_bits=8, learned=True)),
    (Tied, torch.float16, resolve(num_bits=1, learned=True, group_size=7)),
]
IDS = [
    f"{net.__name__}-{str(dtype)[6:]}-{s.num_bits}bit-{s.codebook or s.type}-{s.strategy}"
    for net, dtype, s in CASES
]


@pytest.mark.parametrize(("net", "dtype", "scheme"), CASES, ids=IDS)
def test_packed_and_folded_programs_run_like_the_dequantized_one(net, dtype, scheme):
    program = exported(net, dtype)
    quantized = quantized_of(program, scheme)
    assert quantized
    reference = with_tensors(program, {name: weight.dequantize() for name, weight in quantized.items()})
    packed = pack_program(program, quantized)
    saved = through_a_file(packed)
    folded = unpack_program(saved)
    programs = (packed, saved, folded, unpack_program(packed), through_a_file(folded))
    modules, right = [one.module() for one in programs], reference.module()
    for batch in (4, 3):  # the batch size is still free
        inputs = example(net, batch)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        expected = right(inputs)
        assert all(torch.equal(one(inputs), expected) for one in modules)

    before, after = tensors(program), tensors(folded)
    assert list(folded.state_dict) == list(program.state_dict)
    assert {n: (v.shape, v.dtype, type(v)) for n, v in after.items()} == {
        n: (v.shape, v.dtype, type(v)) for n, v in before.items()
    }
    assert all(torch.equal(after[name], weight.dequantize()) for name, weight in quantized.items())
    assert aliases(after) == aliases(before)
    assert [(layer.name, layer.kind) for layer in layers(folded)] == [
        (layer.name, layer.kind) for layer in layers(program)
    ]


@pytest.mark.parametrize(("net", "dtype", "scheme"), CASES, ids=IDS)
def test_stored_bytes_are_as_predicted(net, dtype, scheme):
    program = exported(net, dtype)
    quantized = quantized_of(program, scheme)
    stored = tensors(pack_program(program, quantized))
    for name, weight in quantized.items():
        real = sum(
            stored[name + part].nbytes
            for part in ("_packed", "_scale", "_zero_point", "_codebook")
            if name + part in stored
        )
        assert real == weight.stored_bytes() == predicted_bytes(weight.shape, weight.axis, scheme, dtype)
        rows, columns = weight.codes.shape
        told = bits_per_weight(scheme, weight.shape, 8 * dtype.itemsize, axis=weight.axis)
        if scheme.symmetric and dtype != torch.float64:  # float64 weights have codebooks of as many bits
            assert -1e-6 < real - told * rows * columns / 8 < 1  # codes fill whole bytes
        assert name not in stored


def test_zero_points_are_packed_where_that_saves():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(256, 130)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    inputs = torch.randn(2, 256)
    program = torch.export.export(Wide().eval(), (inputs,))
    scheme = resolve("W3A16_ASYM", group_size=32)
    quantized = quantized_of(program, scheme)
    packed = pack_program(program, quantized)
    weight = quantized["fc.weight"]
    stored = tensors(packed)
    assert stored["fc.weight_zero_point"].nbytes == packed_bytes(130 * 8, 3)
    assert sum(value.nbytes for name, value in stored.items() if name != "fc.bias") == weight.stored_bytes()
    expected = with_tensors(program, {"fc.weight": weight.dequantize()}).module()(inputs)
    assert torch.equal(packed.module()(inputs), expected)
    assert torch.equal(unpack_program(through_a_file(packed)).module()(inputs), expected)


def test_tied_weights_are_stored_and_unpacked_once():
    program = exported(Tied)
    quantized = quantized_of(program, SCHEMES["W4A16"])
    name = next(name for name in quantized if name != "body.weight")
    for named in ("embed.weight", "head.weight"):  # either stands for both
        packed = pack_program(program, {named: quantized[name]})
        stored = tensors(packed)
        assert stored["head.weight_packed"].data_ptr() == stored["embed.weight_packed"].data_ptr()
        assert [name for name in stored if name.endswith("_scale")] == [f"{name}_scale"]
        assert sum("mul" in node.name for node in packed.graph.nodes) == 1
    values = tensors(unpack_program(through_a_file(packed)))
    assert values["head.weight"].data_ptr() == values["embed.weight"].data_ptr()


def test_one_layer_can_stay_as_it_is():
    program = exported(Convolutions)
    weight = quantized_of(program, SCHEMES["W8A16"])["plain.weight"]
    stored = tensors(pack_program(program, {"plain.weight": weight}))
    assert torch.equal(stored["head.weight"], tensors(program)["head.weight"])
    assert "plain.weight_packed" in stored


def test_weights_are_unpacked_right_before_their_use():
    """So that at no time more than the weights in use are in memory as floats."""
    packed = pack_program(exported(Convolutions), quantized_of(exported(Convolutions), SCHEMES["W4A16"]))
    nodes = list(packed.graph.nodes)
    for place, node in enumerate(nodes):
        if node.target is torch.ops.aten.contiguous.default:
            assert nodes[place + 1] in node.users


def test_the_programs_given_stay_as_they_are():
    program = exported(Recurrent)
    before = save_program(program)
    packed = pack_program(program, quantized_of(program, SCHEMES["W4A16"]))
    assert save_program(program) == before
    before = save_program(packed)
    unpack_program(packed)
    assert save_program(packed) == before


def test_the_same_input_gives_the_same_bytes():
    program = exported(Tied, torch.bfloat16)
    quantized = quantized_of(program, SCHEMES["W3A16"])
    turned = dict(reversed(quantized.items()))
    assert save_program(pack_program(program, quantized)) == save_program(pack_program(program, turned))


def test_unpacking_leaves_other_tensors_of_such_names_alone():
    class Lookalike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w_packed", torch.ones(3))
            self.register_buffer("w_scale", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return ((x + self.w_packed) * self.w_scale).contiguous()

    program = torch.export.export(Lookalike().eval(), (torch.ones(3),))
    assert list(unpack_program(program).state_dict) == ["w_packed", "w_scale"]


def test_weights_that_do_not_fit_are_refused():
    quantized = quantized_of(exported(Tied), SCHEMES["W8A16"])["body.weight"]
    with pytest.raises(ProgramError, match=r"body\.weight: the program stores no such tensor"):
        pack_program(exported(Recurrent), {"body.weight": quantized})
    with pytest.raises(
        ProgramError, match=r"body\.weight: quantized as torch\.float32 \(24, 24\), but the program"
    ):
        pack_program(exported(Tied, torch.bfloat16), {"body.weight": quantized})
    packed = pack_program(exported(Tied), {"body.weight": quantized})
    with pytest.raises(ProgramError, match=r"body\.weight: the program stores no such tensor"):
        pack_program(packed, {"body.weight": quantized})


def test_the_file_is_near_the_theory():
    """Within 5 % of codes, scales and zero points, plus 8 kB and 600 bytes a weight for the graph."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(1)
    program = torch.export.export(Wide().eval(), (torch.randn(2, 512),))
    for name in ("W8A16", "W4A16", "W4A16_ASYM", "W3A16_ASYM"):
        scheme = SCHEMES[name]
        size = len(save_program(pack_program(program, quantized_of(program, scheme))))
        theory = 4 * 512 * 512 * bits_per_weight(scheme, (512, 512), 32) / 8
        biases = 4 * 512 * 4
        assert size - biases <= theory * 1.05 + 8_000 + 4 * 600


PLAIN_RUN = """
import sys
for name in ("fleetpress", "compression"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
for name in sys.argv[2:]:
    folder = sys.argv[1] + "/" + name
    inputs, expected = torch.load(folder + ".tensors", weights_only=True)
    program = torch.export.load(folder + ".pt2")
    assert torch.equal(program.module()(inputs), expected), name
assert not any(name.startswith("fleetpress.") for name in sys.modules)
print("equal")
"""


def test_packed_programs_run_where_this_package_is_not(tmp_path: Path):
    cases = [
        (Convolutions, SCHEMES["W4A16_ASYM"]),
        (Transposed, SCHEMES["W3A16"]),
        (Recurrent, SCHEMES["W8A16"]),
        (Tied, SCHEMES["W4A16"]),
        (Convolutions, SCHEMES["NF4"]),
        (Transposed, SCHEMES["MXFP4"]),
        (Recurrent, SCHEMES["TERNARY"]),
        (Tied, SCHEMES["BINARY"]),
        (Tied, SCHEMES["FP8"]),
        (Convolutions, resolve(num_bits=3, learned=True)),
    ]
    names = [f"{net.__name__}-{place}" for place, (net, _) in enumerate(cases)]
    for name, (net, scheme) in zip(names, cases, strict=True):
        program = exported(net)
        quantized = quantized_of(program, scheme)
        data = save_program(pack_program(program, quantized))
        (tmp_path / f"{name}.pt2").write_bytes(data)
        reference = with_tensors(program, {key: weight.dequantize() for key, weight in quantized.items()})
        buffer = io.BytesIO()
        torch.save((example(net), reference.module()(example(net))), buffer)
        (tmp_path / f"{name}.tensors").write_bytes(buffer.getvalue())
    command = [sys.executable, "-c", PLAIN_RUN, str(tmp_path), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "equal\n", done.stderr
