"""The step prune: scores, the choice of units, what makes up for them, and rounds of it."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch.export import ExportedProgram

from fleetpress.compression.meter import Meter
from fleetpress.compression.pruning import PruneOptions, find_units
from fleetpress.compression.pruning import prune as choose
from fleetpress.compression.pruning.compensate import compensate
from fleetpress.compression.pruning.withdrawing import withdraw
from fleetpress.compression.rounds import composed, share_after
from fleetpress.compression.sparsity import is_sparsifier
from fleetpress.compression.statistics import NeuronStatistics

from ..handover import Payload, record
from ..spec.layer_shares import shares_of
from ..tasks import StepResult
from .gradients import gradient_statistics
from .materials import (
    calibration,
    first_arrays,
    round_program,
    store_tensors,
    trained_program,
)
from .zeroing import zero_weights


def prune_options(step: Mapping[str, Any]) -> PruneOptions:
    """The part of a recipe's `prune` that says which units go."""
    asked = {item.name: step[item.name] for item in fields(PruneOptions) if item.name in step}
    return PruneOptions(**{**asked, "layers": shares_of(step)})


def prune(payload: Payload) -> StepResult:
    """Score units and choose those to delete. Only their indices are recorded, beside them corrected tensors of the
    layers that read them, if any: deleting is a pure function of both. A method that zeroes weights records masks.
    """
    if is_sparsifier(payload["options"]["method"]):
        return zero_weights(payload)
    step, program = payload["options"], round_program(payload)
    options, whole = prune_options(step), None
    if "round" in payload:
        assert options.sparsity is not None, "checked by the spec"
        share = share_after(options.sparsity, payload["round"] + 1, step["rounds"])
        options, whole = replace(options, sparsity=share), _units_in_the_beginning(payload, options)
    observed = calibration(payload, "observe")
    inputs = {} if observed is None else {name: item.inputs for name, item in observed.weights.items()}
    result = choose(program, options, _neurons(payload), seed=payload["seed"], inputs=inputs, whole=whole)
    facts: dict[str, Any] = {
        "removed": {name: list(units) for name, units in result.removed.items()},
        "units": dict(result.units),
        "skipped": dict(result.skipped),
        **({"structure": list(options.structure)} if options.structure else {}),
    }
    if "round" in payload:
        facts |= _in_the_original(payload, result.removed, facts)
    outputs = []
    how = step.get("compensate", "none")
    if how != "none":
        found = compensate(program, result.removed, inputs, how, options.structure)
        meter = Meter(program, first_arrays(payload["data"]["train"]))
        found = withdraw(program, result.removed, found, meter.increase_of, options.structure)
        facts |= {"compensated": dict.fromkeys(found.corrected, how), "uncompensated": dict(found.skipped)}
        if found.values:
            outputs.append(store_tensors(payload, found.values))
    return StepResult(result=facts, outputs=tuple(outputs))


def _units_in_the_beginning(payload: Payload, options: PruneOptions) -> dict[str, int]:
    program: ExportedProgram = trained_program(payload)
    units = find_units(program, options.targets, options.ignore, options.structure)
    return {group.name: group.count for group in units.groups}


def _in_the_original(
    payload: Payload, removed: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The facts of all rounds so far together, in the original's units; what this round deletes of what it found."""
    rounds = payload["stages"].get("rounds", ())
    before = record(payload, rounds[-1][0]).result if rounds else {**facts, "removed": {}}
    gone = composed(before["removed"], removed, before["units"])
    return {
        "removed": {name: list(units) for name, units in gone.items()},
        "units": before["units"],
        "skipped": before["skipped"],
        "round_removed": {name: list(units) for name, units in removed.items()},
    }


def _neurons(payload: Payload) -> dict[str, NeuronStatistics] | None:
    statistics = gradient_statistics(payload)
    return None if statistics is None else statistics.neurons()
