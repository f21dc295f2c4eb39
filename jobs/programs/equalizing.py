"""Scales between layers: the task that chooses them, and what later tasks see of them."""

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.equalization import EQUALIZERS, Equalization
from fleetpress.compression.equalization import equalize as choose_scales
from fleetpress.compression.program import with_tensors

from ..handover import Payload
from ..spec.schemes import options_of, scheme_of
from ..tasks import StepResult
from .materials import (
    calibration,
    final_program,
    remembered,
    store_tensors,
    stored_tensors,
)
from .quantizing import choose

_TENSOR, _INPUT, _OUTPUT = "tensor/", "input_scale/", "output_scale/"


def equalize_program(payload: Payload) -> StepResult:
    """Choose scales for the final program; its changed tensors are stored, and what layers' inputs are divided by."""
    options = payload["options"]
    program = final_program(payload)
    observed = calibration(payload)
    found = choose_scales(
        program,
        EQUALIZERS[options["equalize"]],
        {
            name: scheme
            for layer in choose(program, options).layers
            for name in layer.weights
            if (scheme := scheme_of(options_of(options, layer.name))).codebook != "learned"
        },
        None if observed is None else observed.weights,
    )
    stored = {_TENSOR + name: value for name, value in found.tensors.items()}
    stored |= {_INPUT + name: value for name, value in found.inputs.items()}
    stored |= {_OUTPUT + name: value for name, value in found.outputs.items()}
    return StepResult(result={"equalized": sorted(found.inputs)}, outputs=(store_tensors(payload, stored),))


def equalized_program(payload: Payload) -> ExportedProgram:
    """The final program with the scaled tensors, if the recipe equalizes: it computes the same."""
    digest = payload["stages"].get("equalize")
    if not digest:
        return final_program(payload)
    return remembered(
        digest, lambda: with_tensors(final_program(payload), _equalization(payload, digest).tensors)
    )


def equalized_calibration(payload: Payload) -> CalibrationStatistics | None:
    """What the layers of the equalized program read; None without calibration."""
    observed, digest = calibration(payload), payload["stages"].get("equalize")
    if observed is None or not digest:
        return observed
    return remembered(f"calibration-{digest}", lambda: _equalization(payload, digest).rescaled(observed))


def _equalization(payload: Payload, digest: str) -> Equalization:
    values = stored_tensors(payload, digest)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    return Equalization(tensors=part(_TENSOR), inputs=part(_INPUT), outputs=part(_OUTPUT))
