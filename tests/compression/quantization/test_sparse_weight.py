"""Weights with many zeros are stored without them, and come back to the last bit."""

import io
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import aliases, tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_layer, sparse_weight
from fleetpress.compression.quantization.packed_program import pack_program, unpack_program
from fleetpress.compression.quantization.sparse_weight import (
    SparseWeight,
    most_bytes,
    sparse_floats,
    sparse_form,
    zeros_kept,
)
from fleetpress.compression.scheme import QuantScheme, resolve
from fleetpress.storage.programs import load_program, save_program

X = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(3))
CASES = [
    (resolve("W4A16", group_size=10), torch.float32),  # no row is a multiple of 10
    (resolve("W3A16_ASYM", group_size=4), torch.bfloat16),
    (resolve("FP8"), torch.float16),
    (resolve("NF4", group_size=8), torch.float32),
    (resolve("TERNARY"), torch.bfloat16),
]
SCHEMES = [
    *(scheme for scheme, _ in CASES[:4]),
    resolve("W8A16_ASYM"),
    resolve("W2A16", strategy="tensor"),
]


def label(scheme: QuantScheme) -> str:
    return f"{scheme.codebook or scheme.type}{scheme.num_bits}-{scheme.strategy}"


class Net(nn.Module):
    """A convolution with groups, a recurrent layer, a product whose units are columns, two tied linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 2, groups=2)
        self.gru = nn.GRU(8, 9, batch_first=True)
        self.mix = nn.Parameter(torch.randn(9, 12))
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).transpose(1, 2)
        return self.two(torch.tanh(self.one(self.gru(x)[0][:, -1] @ self.mix)))


def with_zeros(program: ExportedProgram, share: float) -> ExportedProgram:
    """The program with random weights of all layers zeroed."""
    generator = torch.Generator().manual_seed(4)
    state = tensors(program)
    owners = aliases(state)
    values = {}
    for name in (name for layer in layers(program) for name in layer.weights):
        owner = owners.get(name, name)
        if owner not in values:
            kept = torch.rand(state[owner].shape, generator=generator) >= share
            values[owner] = state[owner].detach() * kept
    return with_tensors(program, values | {name: values[owner] for name, owner in owners.items()})


@cache
def exported(dtype: torch.dtype) -> ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().to(dtype).eval(), (X.to(dtype),), dynamic_shapes=({0: Dim.DYNAMIC},))


@cache
def made(dtype: torch.dtype, share: float = 0.8) -> ExportedProgram:
    return with_zeros(exported(dtype), share)


def quantized_of(program: ExportedProgram, scheme: QuantScheme) -> dict[str, QuantizedWeight]:
    found: dict[str, QuantizedWeight] = {}
    for layer in layers(program):
        found |= quantize_layer(layer, tensors(program), scheme, QUANTIZERS["round_to_nearest"])
    return found


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight with zeros is stored without them, however small it is."""
    monkeypatch.setattr(sparse_weight, "NODES_BYTES", -(10**9))


def same_outputs(programs: list[ExportedProgram], expected: ExportedProgram, dtype: torch.dtype) -> None:
    inputs = [X[:batch].to(dtype) for batch in (5, 2)]  # the batch size is still free
    module = expected.module()
    wanted = [module(x) for x in inputs]
    for program in programs:
        module = program.module()
        assert all(torch.equal(module(x), value) for x, value in zip(inputs, wanted, strict=True))


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    CASES,
    ids=lambda case: label(case) if isinstance(case, QuantScheme) else str(case),
)
def test_codes_behind_a_mask_are_the_dequantized_weights(
    scheme: QuantScheme, dtype: torch.dtype, always: None
) -> None:
    program = made(dtype)
    quantized = {name: sparse_form(weight) for name, weight in quantized_of(program, scheme).items()}
    assert all(isinstance(weight, SparseWeight) for weight in quantized.values())
    owners = aliases(tensors(program))
    values = {owners.get(name, name): weight.dequantize() for name, weight in quantized.items()}
    values |= {name: values[owner] for name, owner in owners.items()}
    expected = with_tensors(program, values)
    packed = pack_program(program, quantized)
    saved = load_program(save_program(packed))
    folded = unpack_program(saved)
    same_outputs([packed, saved, folded], expected, dtype)
    assert list(tensors(folded)) == list(tensors(program))
    assert all(torch.equal(tensors(folded)[name], value) for name, value in values.items())
    assert len(folded.graph.nodes) == len(program.graph.nodes)
    stored = saved.state_dict
    for name, weight in quantized.items():
        assert isinstance(weight, SparseWeight)
        parts = (
            stored[name + part]
            for part in ("_packed", "_mask", "_scale", "_zero_point", "_codebook")
            if name + part in stored
        )
        assert sum(part.nbytes for part in parts) == weight.stored_bytes()
        zeros = int((weight.dequantize() == 0).sum())
        assert weight.stored_bytes() <= most_bytes(weight.shape, weight.axis, scheme, dtype, zeros)


def test_floats_behind_a_mask_are_the_weights(always: None) -> None:
    dtype = torch.float64
    program = made(dtype)
    names = [name for layer in layers(program) for name in layer.weights]
    packed = pack_program(program, {}, names)
    data = save_program(packed)
    saved = load_program(data)
    folded = unpack_program(saved)
    plain = torch.export.load(io.BytesIO(data))  # as anybody runs it
    same_outputs([packed, saved, folded, plain], program, dtype)
    assert list(tensors(folded)) == list(tensors(program))
    assert all(torch.equal(value, tensors(program)[name]) for name, value in tensors(folded).items())
    assert tensors(folded)["two.weight"].data_ptr() == tensors(folded)["one.weight"].data_ptr()
    stored = saved.state_dict
    assert "mix" not in stored
    form = sparse_floats(tensors(program)["mix"])
    assert form is not None
    assert stored["mix_values"].nbytes + stored["mix_mask"].nbytes == form.stored_bytes()
    assert form.values.numel() == int((tensors(program)["mix"] != 0).sum())


def test_some_are_coded_some_are_floats_some_are_dense(always: None) -> None:
    program = made(torch.float32)
    quantized = {"mix": sparse_form(quantized_of(program, SCHEMES[0])["mix"])}
    packed = pack_program(program, quantized, ["mix", "one.weight"])
    assert {"mix_packed", "mix_mask", "one.weight_values", "two.weight_values", "conv.weight"} <= set(
        packed.state_dict
    )
    expected = with_tensors(program, {"mix": quantized["mix"].dequantize()})
    same_outputs([packed, unpack_program(load_program(save_program(packed)))], expected, torch.float32)


def test_a_weight_of_zeros_alone(always: None) -> None:
    program = made(torch.float32, share=2.0)
    quantized = {name: sparse_form(weight) for name, weight in quantized_of(program, SCHEMES[1]).items()}
    names = ["one.weight", "conv.weight"]
    coded = {name: weight for name, weight in quantized.items() if name == "mix"}
    packed = pack_program(program, coded, names)
    same_outputs([load_program(save_program(packed)), unpack_program(packed)], program, torch.float32)


def linear(share: float, columns: int = 400, rows: int = 120) -> ExportedProgram:
    torch.manual_seed(1)
    return with_zeros(
        torch.export.export(
            nn.Linear(columns, rows), (torch.randn(3, columns),), dynamic_shapes=({0: Dim.DYNAMIC},)
        ),
        share,
    )


@pytest.mark.parametrize(
    ("scheme", "share"),
    [
        (resolve("W4A16"), 0.0),
        (resolve("W4A16"), 0.8),
        (resolve("W4A16"), 0.97),
        (resolve("W8A16_ASYM"), 0.5),
        (resolve("W3A16"), 0.5),
    ],
    ids=lambda case: str(getattr(case, "num_bits", case)),
)
def test_a_file_is_never_larger_for_it(scheme: QuantScheme, share: float) -> None:
    program = linear(share)
    dense = quantized_of(program, scheme)
    chosen = {name: sparse_form(weight) for name, weight in dense.items()}
    before, after = (len(save_program(pack_program(program, of))) for of in (dense, chosen))
    if share in (0.5, 0.8):
        assert isinstance(chosen["weight"], SparseWeight)
        assert after < before
        assert chosen["weight"].stored_bytes() < 0.85 * dense["weight"].stored_bytes()
    assert after <= before
    assert (share > 0) or not isinstance(chosen["weight"], SparseWeight)


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_file_of_floats_is_never_larger_for_it(share: float) -> None:
    program = linear(share)
    before, after = (len(save_program(pack_program(program, {}, of))) for of in ((), ("weight",)))
    assert after <= before
    assert (after < before) == (share == 0.9)


def test_small_weights_stay_dense() -> None:
    program = made(torch.float32)
    assert not any(
        isinstance(sparse_form(weight), SparseWeight) for weight in quantized_of(program, SCHEMES[0]).values()
    )
    assert list(pack_program(program, {}, ["mix"]).state_dict) == list(program.state_dict)


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_rounding_keeps_zeros_and_so_does_the_hook_for_methods_that_move_them(scheme: QuantScheme) -> None:
    program = made(torch.float32)
    for name, weight in quantized_of(program, scheme).items():
        original = tensors(program)[name].detach()
        assert (weight.dequantize()[original == 0] == 0).all()
        assert torch.equal(zeros_kept(weight, original).codes, weight.codes)
        codes = weight.codes.view(torch.uint8) ^ (64 if scheme.type == "float" else 1)
        moved = QuantizedWeight(**{**vars(weight), "codes": codes.view(weight.codes.dtype)})
        assert (moved.dequantize()[original == 0] != 0).any()
        kept = zeros_kept(moved, original).dequantize()
        assert (kept[original == 0] == 0).all()
        assert torch.equal(kept[original != 0], moved.dequantize()[original != 0])


def test_a_learned_codebook_gets_a_zero_and_one_without_is_refused() -> None:
    program = linear(0.8, 60, 40)
    learned, binary = (
        quantize_layer(layers(program)[0], tensors(program), scheme, QUANTIZERS[method])["weight"]
        for scheme, method in (
            (resolve(num_bits=3, learned=True), "k_means"),
            (resolve("BINARY"), "round_to_nearest"),
        )
    )
    original = tensors(program)["weight"].detach()
    kept = sparse_form(zeros_kept(learned, original))
    assert (kept.dequantize()[original == 0] == 0).all()
    near = learned.entries.abs().argmin()
    assert torch.equal(kept.entries[torch.arange(8) != near], learned.entries[torch.arange(8) != near])
    expected = with_tensors(program, {"weight": kept.dequantize()})
    packed = load_program(save_program(pack_program(program, {"weight": SparseWeight(**vars(kept))})))
    x = torch.randn(3, 60)
    assert torch.equal(packed.module()(x), expected.module()(x))
    assert torch.equal(tensors(unpack_program(packed))["weight"], kept.dequantize())
    with pytest.raises(
        QuantizationError, match="its codebook has no zero, so pruned weights would come back"
    ):
        zeros_kept(binary, original)


@pytest.mark.parametrize("method", ["gptq", "coordinate_descent"])
@pytest.mark.parametrize("scheme", [resolve("W4A16", group_size=16), resolve("W3A16_ASYM")], ids=label)
def test_error_feedback_goes_around_zeros(method: str, scheme: QuantScheme) -> None:
    program = linear(0.6, 48, 24)
    x = torch.randn(96, 48) @ (torch.randn(48, 48) / 7 + torch.eye(48))
    weights = calibrate(program, {"inputs": x}, 96).weights
    original = tensors(program)["weight"].detach()
    errors = []
    for name in ("round_to_nearest", method):
        found = quantize_layer(layers(program)[0], tensors(program), scheme, QUANTIZERS[name], weights)[
            "weight"
        ]
        assert (found.dequantize()[original == 0] == 0).all()
        errors.append(float((x @ (found.dequantize() - original).T).square().sum()))
    assert errors[1] < 0.9 * errors[0]
