"""Weights to zero: which, by which method, and how the choice is recorded for the steps that follow."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors, trainable
from fleetpress.compression.quantization.packing import pack
from fleetpress.compression.quantization.sparse_weight import sparse_floats
from fleetpress.compression.sparsity import SPARSIFIERS
from fleetpress.compression.sparsity.zero_layers import ZeroedWeight, zero_layers

from ..handover import Payload, record
from ..spec.recipe import zeroes_weights
from ..tasks import StepResult
from .gradients import gradient_statistics
from .materials import (
    KEEP_MASK,
    calibration,
    final_program,
    keep_masks,
    store_tensors,
    trained_program,
)
from .quantizing import choose


def zero_weights(payload: Payload) -> StepResult:
    """Zero weights of the trained program. Masks are stored as bit streams, and weights only if the method moves them.

    The record tells for every weight how many of how many entries are zero, and which method chose them.
    """
    program, options = trained_program(payload), payload["options"]
    choice = choose(program, options, step="prune")
    observed, collected = calibration(payload, "observe"), None
    if SPARSIFIERS[options["method"]].needs_gradients:
        collected = gradient_statistics(payload)
    result = zero_layers(
        choice.layers,
        tensors(program),
        options,
        None if observed is None else observed.weights,
        None if collected is None else collected.moments(),
    )
    stored: dict[str, Tensor] = {
        KEEP_MASK + name: pack(weight.kept.byte(), 1) for name, weight in result.weights.items()
    }
    if SPARSIFIERS[options["method"]].moves_weights:
        stored |= {name: weight.values for name, weight in result.weights.items()}
    return StepResult(
        result={
            "removed": {},
            "units": {},
            "skipped": {**choice.skipped, **result.skipped},
            "unused_ignores": list(choice.unused_ignores),
            "zeroed": {name: _facts(weight) for name, weight in result.weights.items()},
        },
        outputs=(store_tensors(payload, stored),),
    )


def _facts(weight: ZeroedWeight) -> dict[str, Any]:
    kept = weight.kept
    return {
        "layer": weight.layer,
        "kind": weight.kind,
        "method": weight.method,
        "zeros": int((~kept).sum()),
        "weights": kept.numel(),
    }


def trained_masks(payload: Payload, program: ExportedProgram) -> dict[str, Tensor]:
    """Masks (True = kept) of those weights of the pruned `program` that training changes, by state name."""
    known = set(trainable(program))
    return {name: mask for name, mask in keep_masks(payload).items() if name in known}


def sparse_names(payload: Payload) -> tuple[str, ...]:
    """Weights whose zeros need not be stored: those of all layers, if the recipe zeroes weights. Tied ones once."""
    if not zeroes_weights(payload["recipe"]):
        return ()
    program = final_program(payload)
    owners = aliases(tensors(program))
    names = (owners.get(name, name) for layer in layers(program) for name in layer.weights)
    return tuple(dict.fromkeys(names))


def float_bytes(payload: Payload, values: Mapping[str, Tensor], quantized: Collection[str]) -> dict[str, int]:
    """Stored bytes of those `values` that a `.pt2` holds as floats without their zeros, by state name."""
    owners = aliases(values)
    coded = {owners.get(name, name) for name in quantized}
    forms = {name: sparse_floats(values[name]) for name in sparse_names(payload) if name not in coded}
    return {name: form.stored_bytes() for name, form in forms.items() if form is not None}


def layer_sparsity(payload: Payload) -> dict[str, float]:
    """Share of the weights that are zero in the final program, by layer that the recipe zeroes weights of."""
    if not zeroes_weights(payload["recipe"]):
        return {}
    program, touched = final_program(payload), _zeroed(payload)
    values = tensors(program)
    owners = aliases(values)
    found = {}
    for layer in layers(program):
        names = [owners.get(name, name) for name in layer.weights]
        if touched is None or any(name in touched for name in names):
            zeros = sum(int((values[name] == 0).sum()) for name in names)
            found[layer.name] = round(zeros / max(1, sum(values[name].numel() for name in names)), 6)
    return found


def warnings(payload: Payload) -> list[str]:
    """What a reader of the result should know about its zeros."""
    asked = payload["recipe"].get("prune", {}).get("method")
    told = []
    for name, facts in (_zeroed(payload) or {}).items():
        if facts["method"] != asked:
            lacks = "gradients" if SPARSIFIERS[asked].needs_gradients else "inputs"
            told.append(
                f"{name}: the {lacks} of its {facts['kind']} layer are not observed, so its zeros were chosen by "
                f"{facts['method']}"
            )
        if facts["zeros"] == facts["weights"]:
            told.append(f"{name}: all its weights are zero; lower sparsity, or add the layer to `ignore`")
    return told


def _zeroed(payload: Payload) -> Mapping[str, Any] | None:
    """What the prune task zeroed, by state name; None where no such task did it."""
    digest = payload["stages"].get("prune")
    return record(payload, digest).result.get("zeroed") if digest else None
