"""The file that a program is published as: made of what the stages of a payload left, and proved to hold just that."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.errors import MethodError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.modes import eval_program
from fleetpress.compression.program import aliases, bind, tensors
from fleetpress.compression.quantization.packed_program import has_integers, pack_program, unpack_program
from fleetpress.compression.smoke import smoke_inputs
from fleetpress.storage.artifact import PROGRAM_FILE
from fleetpress.storage.coded_model import MODEL_FILE as CODED_FILE
from fleetpress.storage.errors import ArtifactCorrupt
from fleetpress.storage.programs import load_program, save_program

from ..handover import Payload
from ..spec.recipe import DEFAULT_FORMAT
from . import zeroing
from .biases import corrected_program, rounded_program
from .coded_programs import (
    coded_program,
    decoded_program,
    plain_program,
)
from .equalizing import equalized_program
from .quantizing import quantized_weights


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What would be published: the file, its bytes, the program read back from them, the one over plain weights.

    `served` is what `load_artifact` runs: over plain weights, but for layers on integer kernels. All are the same
    program, if it runs on its plain weights; `weight_bytes` are those of each stored tensor in the file, where that is
    known better than from its shape.
    """

    file: str
    form: str
    data: bytes
    loaded: ExportedProgram
    served: ExportedProgram
    plain: ExportedProgram
    weight_bytes: Mapping[str, int] | None = None


def assembled(payload: Payload) -> Candidate:
    """The compressed program that the stages make, in the form that the recipe asks for.

    Raises ArtifactCorrupt if the bytes do not come back as what was written.
    """
    corrected = corrected_program(payload, equalized_program(payload))
    final = eval_program(rounded_program(payload, corrected, quantized_weights(payload)))
    form = payload["recipe"].get("format", DEFAULT_FORMAT)
    return (_coded if form == "archive" else _packed)(payload, final)


def _packed(payload: Payload, final: ExportedProgram) -> Candidate:
    packed = pack_program(final, quantized_weights(payload), zeroing.sparse_names(payload))
    data = save_program(packed)
    loaded = load_program(data)
    _prove(packed, loaded, payload)
    served = unpack_program(loaded, keep_integers=True)
    return Candidate(
        file=PROGRAM_FILE,
        form="pt2",
        data=data,
        loaded=loaded,
        served=served,
        plain=unpack_program(served) if has_integers(served) else served,
    )


def _coded(payload: Payload, final: ExportedProgram) -> Candidate:
    quantized = quantized_weights(payload)
    integers = [name for name, weight in quantized.items() if weight.scheme.activation_bits]
    if integers:
        raise MethodError(
            f"{integers[0]} is to run on integer kernels, which an archive of plain weights cannot keep; "
            "delete format: archive, or take a scheme such as W8A16"
        )
    expected = plain_program(final, quantized)
    data, sizes = coded_program(expected, quantized)
    loaded = decoded_program(data)
    _prove_tensors(expected, loaded, payload)
    _prove(expected, loaded, payload)
    return Candidate(
        file=CODED_FILE,
        form="archive",
        data=data,
        loaded=loaded,
        served=loaded,
        plain=loaded,
        weight_bytes=sizes,
    )


def _prove(expected: ExportedProgram, published: ExportedProgram, payload: Payload) -> None:
    """Run the published bytes and the program in memory on one batch; they must agree to the last bit."""
    inputs = smoke_inputs(published)
    mine, theirs = _outputs(Runner(expected), inputs), _outputs(Runner(published), inputs)
    if len(mine) != len(theirs) or not all(_same(a, b) for a, b in zip(mine, theirs, strict=True)):
        raise ArtifactCorrupt(
            f"{payload['model']['name']}: the published program computes something else than the one in memory; "
            "nothing was published"
        )


def _prove_tensors(expected: ExportedProgram, decoded: ExportedProgram, payload: Payload) -> None:
    """Every stored tensor came back to the last bit, and what is tied is tied."""
    mine, theirs = tensors(expected), tensors(decoded)
    same = list(mine) == list(theirs) and aliases(mine) == aliases(theirs)
    wrong = [name for name in mine if not same or not _same_bits(mine[name], theirs[name])]
    if wrong:
        raise ArtifactCorrupt(
            f"{payload['model']['name']}: {wrong[0]} is decoded to something else than what was coded; "
            "nothing was published"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return torch.equal(a, b)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit; NaN is equal to NaN: made-up inputs may well lead there."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def _outputs(runner: Runner, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    own = {name: value.clone() for name, value in inputs.items()}  # some programs write into them
    args, kwargs = bind(runner.program, own)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # the same draws for a program that draws
        result = runner.module(*args, **kwargs)
    leaves, _ = torch.utils._pytree.tree_flatten(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
