"""Coded models hold a program to the last bit; a file that is not what was written is refused with one sentence."""

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_layer
from fleetpress.compression.scheme import QuantScheme
from fleetpress.jobs.programs.coded_programs import (
    coded_program,
    decoded_program,
    plain_program,
)
from fleetpress.storage.coded_model import CodedPart, CodedWeight, read_model, write_model
from fleetpress.storage.errors import ArtifactCorrupt, InvalidModelFile, StorageError
from fleetpress.storage.programs import module_to_program, program_members_of, save_program

SCHEMES = {
    "symmetric": QuantScheme(num_bits=3),
    "zero points": QuantScheme(num_bits=4, symmetric=False),
    "groups": QuantScheme(num_bits=8, symmetric=False, strategy="group", group_size=4),
    "tensor": QuantScheme(num_bits=2, strategy="tensor"),
}


class Net(nn.Module):
    """A tied embedding, a transposed convolution (units along axis 1), buffers, a constant, half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.norm = nn.ConvTranspose1d(6, 4, 3), nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.randn(6, dtype=torch.bfloat16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.embed(ids) * self.gain.float()
        wide = self.norm(self.up(found.transpose(1, 2)))
        return self.head(found).sum(1) + wide.mean() + torch.tensor([1.0, 2.0]).sum()


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    torch.manual_seed(0)
    return module_to_program(Net(), [torch.zeros(2, 5, dtype=torch.long)])


def quantized(program: ExportedProgram, scheme: QuantScheme) -> dict[str, QuantizedWeight]:
    values = tensors(program)
    tied = aliases(values)
    method = QUANTIZERS["round_to_nearest"]
    return {
        tied.get(name, name): weight
        for layer in layers(program)
        for name, weight in quantize_layer(layer, values, scheme, method).items()
    }


def same(one: ExportedProgram, other: ExportedProgram) -> bool:
    return save_program(one, compress=False) == save_program(other, compress=False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_programs_come_back_to_the_last_bit(program: ExportedProgram, scheme: str) -> None:
    weights = quantized(program, SCHEMES[scheme])
    assert len(weights) == 2
    plain = plain_program(program, weights)
    data, sizes = coded_program(plain, weights)
    found = decoded_program(data)
    assert same(found, plain)
    assert aliases(tensors(found)) == aliases(tensors(plain)) == {"head.weight": "embed.weight"}
    assert sizes.keys() == tensors(plain).keys()
    assert sizes["up.weight"] < plain.state_dict["up.weight"].nbytes
    assert coded_program(plain, weights)[0] == data
    ids = torch.arange(10).view(2, 5)
    assert torch.equal(found.module()(ids), plain.module()(ids))


def test_programs_without_codes_come_back_and_are_smaller(program: ExportedProgram) -> None:
    plain = plain_program(program, {})
    data, _ = coded_program(plain, {})
    assert same(decoded_program(data), program)
    assert len(data) < len(save_program(program)) / 2


def test_weights_that_lie_otherwise_in_memory_come_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(3, 2))
    net[0].weight = nn.Parameter(net[0].weight.detach().to(memory_format=torch.channels_last))
    whole = torch.randn(4, 3)
    net[1].weight, net.other = nn.Parameter(whole[:2]), nn.Parameter(whole[1:])
    program = module_to_program(net, [torch.zeros(2, 3, 4, 4)])
    found = decoded_program(coded_program(program, {})[0])
    assert same(found, program)


def test_parts_of_any_name_and_facts_fit_in() -> None:
    """A weight of indices into a codebook, say: the file does not care what its parts mean."""
    program = module_to_program(nn.Linear(40, 30), [torch.zeros(2, 40)])
    members = program_members_of(program)
    codes = np.random.default_rng(0).choice(4, (30, 40), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    parts = {
        "codes": CodedPart(dtype="U8", array=codes),
        "codebook": CodedPart(dtype="F32", array=np.array([0, -1, 0.5, 2], "<f4")),
        "scale": CodedPart(dtype="BF16", array=np.arange(30, dtype="<u2").reshape(30, 1)),
    }
    written = CodedWeight(parts=parts, facts={"method": "k_means", "bits": 2, "losses": [0.5, None]}, axis=0)
    data, sizes = write_model(members, {"weight": written})
    found = read_model(data).weights["weight"]
    assert (found.facts, found.axis) == (written.facts, 0)
    assert list(found.parts) == sorted(parts)
    for name, part in parts.items():
        assert found.parts[name].dtype == part.dtype
        assert np.array_equal(found.parts[name].array, part.array)
    assert sizes["weight"] < 300


@pytest.fixture(scope="module")
def small() -> bytes:
    torch.manual_seed(0)
    program = module_to_program(nn.Linear(9, 8), [torch.zeros(2, 9)])
    weights = quantized(program, QuantScheme(num_bits=4))
    return coded_program(plain_program(program, weights), weights)[0]


def test_every_damaged_byte_is_noticed(small: bytes) -> None:
    for place in range(len(small)):
        damaged = bytearray(small)
        damaged[place] ^= 0x55
        with pytest.raises(StorageError, match=r".; .*(publish|export|save) "):
            decoded_program(bytes(damaged))


@pytest.mark.parametrize("size", [0, 3, 4, 10, 100, -40, -5, -4, -1])
def test_a_file_that_is_cut_short_is_noticed(small: bytes, size: int) -> None:
    with pytest.raises(ArtifactCorrupt, match="publish the model again"):
        decoded_program(small[:size])


def test_other_files_are_told_apart(small: bytes) -> None:
    with pytest.raises(ArtifactCorrupt, match="no coded model"):
        decoded_program(b"PK\x03\x04" + bytes(40))
    with pytest.raises(ArtifactCorrupt, match="another version"):
        decoded_program(b"fpz\x02" + small[4:])


def rebuilt(program: ExportedProgram, weights: dict[str, QuantizedWeight], change: Any) -> bytes:
    """The file, its head and checksum those of a writer who means harm."""
    from fleetpress.storage import coded_model

    texts: list[bytes] = []
    original = coded_model._compressed

    def changed(text: bytes) -> bytes:
        head = json.loads(text)
        change(head)
        texts.append(json.dumps(head).encode())
        return original(texts[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coded_model, "_compressed", changed)
        patch.setattr(coded_model, "_checksum", lambda body, text, sums: _checksum(body, texts[-1], sums))
        return coded_program(program, weights)[0]


def _checksum(body: bytes, text: bytes, sums: list[int]) -> bytes:
    numbers = (zlib.crc32(body), zlib.crc32(text), *sums)
    return zlib.crc32(b"".join(number.to_bytes(4, "little") for number in numbers)).to_bytes(4, "little")


def _signature(head: Any) -> Any:
    return head[0][1][0]


HARM: dict[str, tuple[Any, str]] = {
    "another shape": (lambda head: head[0][0][0].__setitem__(1, [9, 9]), "damaged"),
    "a huge shape": (lambda head: head[0][0][0].__setitem__(1, [1 << 40, 9]), "say they hold"),
    "a shape that overflows": (lambda head: head[0][0][0].__setitem__(1, [1 << 62, 1 << 62]), "."),
    "a strange operator": (lambda head: _signature(head).__setitem__(0, "os.system"), "os.system"),
    "a name that is code": (lambda head: head[0][0][0].append("x;import os"), "plain identifier"),
    "no template": (lambda head: head[2].clear(), "head is damaged"),
    "a negative template": (lambda head: head[3].__setitem__(0, -1), "no whole number"),
    "too few tensors": (lambda head: head[3].pop(), "damaged"),
    "an axis that is none": (lambda head: head[2][0].__setitem__(0, 5), "head is damaged"),
    "an unknown dtype": (lambda head: head[2][0][2]["codes"].__setitem__(0, "F4"), "head is damaged"),
    "too many dimensions": (lambda head: head[2][0][2]["codes"].__setitem__(1, ["r", "c"] + [1] * 99), "99|101"),
    "99 bits": (lambda head: head[2][0][1]["scheme"].update(num_bits=99), "do not fit"),
    "no scheme": (lambda head: head[2][0][1].clear(), "do not fit"),
    "facts that are a list": (lambda head: head[2][0].__setitem__(1, []), "no parts"),
    "a part with another name": (lambda head: head[2][0][2].update(odd=head[2][0][2].pop("scale")), "do not fit"),
    "a tensor in the graph only": (lambda head: head[0][0].insert(1, ["b.weight", [3], "p"]), "damaged"),
    "no graph": (lambda head: head.__setitem__(0, 5), "short form"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARM)
def test_heads_that_mean_harm_are_refused(case: str) -> None:
    change, match = HARM[case]
    program = module_to_program(nn.Linear(9, 8), [torch.zeros(2, 9)])
    weights = quantized(program, QuantScheme(num_bits=4))
    data = rebuilt(plain_program(program, weights), weights, change)
    with pytest.raises((ArtifactCorrupt, InvalidModelFile), match=match):
        decoded_program(data)
