"""Programs to coded models and back: the meeting of tensors and the bytes of `storage.coded_model`."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.errors import CompressionError
from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors, with_tensors
from fleetpress.compression.quantization import QuantizedWeight
from fleetpress.compression.quantization.packed_program import pack_program
from fleetpress.storage.array_coding import Array
from fleetpress.storage.coded_model import DTYPES, CodedModel, CodedPart, CodedWeight, read_model, write_model
from fleetpress.storage.errors import ArtifactCorrupt
from fleetpress.storage.programs import program_members_of, program_without_weights
from fleetpress.storage.tensors import DTYPES as TORCH_DTYPES

from .quantizing import (
    meaning_of,
    parts_of,
    weight_of,
)

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items() if name in DTYPES}


def plain_program(program: ExportedProgram, quantized: Mapping[str, QuantizedWeight]) -> ExportedProgram:
    """The program over the dequantized weights; names tied to a quantized weight stay tied to it."""
    stored = tensors(program)
    tied = aliases(stored)
    values: dict[str, Tensor] = {}
    for name, weight in quantized.items():
        owner = tied.get(name, name)
        value = _like(weight.dequantize(), stored[owner])
        values |= {other: value for other in stored if tied.get(other, other) == owner}
    return with_tensors(program, values)


def coded_program(
    program: ExportedProgram, quantized: Mapping[str, QuantizedWeight]
) -> tuple[bytes, dict[str, int]]:
    """The coded model of the program `plain_program` gave, and the bytes of each stored tensor by name.

    `quantized` are the weights that are written as codes. Raises InvalidModelFile as `save_program` does.
    """
    weights = {
        name: CodedWeight(
            parts={part: _part(value) for part, value in parts_of(weight).items()},
            facts=meaning_of(weight),
            axis=weight.axis,
        )
        for name, weight in quantized.items()
    }
    return write_model(program_members_of(program), weights)


def decoded_program(data: bytes) -> ExportedProgram:
    """The program in the bytes of a coded model, over plain weights, equal to the last bit to what was coded.

    Raises ArtifactCorrupt, InvalidModelFile and UnsafeModelFile.
    """
    return _over_plain_weights(read_model(data))


def packed_program(data: bytes) -> ExportedProgram:
    """The program in the bytes of a coded model with its weights packed, as a `.pt2` of the same recipe holds it.

    Raises as `decoded_program` does.
    """
    model = read_model(data)
    program = _over_plain_weights(model)
    values = tensors(program)
    quantized = {name: _read_back(name, weight, values[name])[0] for name, weight in model.weights.items()}
    return pack_program(program, quantized, [name for layer in layers(program) for name in layer.weights])


def _over_plain_weights(model: CodedModel) -> ExportedProgram:
    skeleton = program_without_weights(model.members)
    stored = tensors(skeleton)
    values: dict[str, Tensor] = {}
    for payload in model.members.payloads:
        entries = {name: model.members.weight_config["config"].get(name) for name in payload.names}
        made: dict[tuple[object, ...], Tensor] = {}
        for name, entry in entries.items():
            if entry is None or name not in stored:
                continue
            if name in model.weights:
                _, value = _read_back(name, model.weights[name], stored[name])
            else:
                value = _tensor(model.members.array(payload), stored[name].dtype)
            meta = entry["tensor_meta"]
            sizes, strides = (tuple(size["as_int"] for size in meta[key]) for key in ("sizes", "strides"))
            view = sizes, strides, meta["storage_offset"]["as_int"]
            if view not in made:
                made[view] = _like(value.reshape(-1).as_strided(*view), stored[name])
            values[name] = made[view]
    return with_tensors(skeleton, values)


def _like(value: Tensor, kept: Tensor) -> Tensor:
    """A parameter if `kept` is one: tied names then hold one object."""
    if isinstance(kept, torch.nn.Parameter):
        return torch.nn.Parameter(value, requires_grad=kept.requires_grad)
    return value


def _part(value: Tensor) -> CodedPart:
    name = _NAMES[value.dtype]
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return CodedPart(dtype=name, array=flat.view(DTYPES[name][0]).reshape(tuple(value.shape)))


def _tensor(array: Array, dtype: torch.dtype) -> Tensor:
    """A tensor over the array's bytes; they are copied if nothing may be written there."""
    flat = array.reshape(-1).view("u1")
    flat = flat if flat.flags.writeable else flat.copy()
    return torch.from_numpy(flat).view(dtype).reshape(array.shape)


def _read_back(name: str, weight: CodedWeight, kept: Tensor) -> tuple[QuantizedWeight, Tensor]:
    """A weight as codes, and what they mean."""
    try:
        parts = {part: _tensor(held.array, TORCH_DTYPES[held.dtype]) for part, held in weight.parts.items()}
        facts = {**weight.facts, "shape": tuple(kept.shape), "axis": weight.axis}
        coded = weight_of(parts, facts)
        value = coded.dequantize()
    except (CompressionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactCorrupt(
            f"{name}: its codes and what is said of them do not fit together "
            f"({type(error).__name__}); publish the model again"
        ) from None
    if value.shape != kept.shape or value.dtype != kept.dtype:
        raise ArtifactCorrupt(
            f"{name}: decodes to {value.dtype} {tuple(value.shape)}, but the program takes {kept.dtype} "
            f"{tuple(kept.shape)}; publish the model again"
        )
    return coded, value
