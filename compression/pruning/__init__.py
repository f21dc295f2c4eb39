"""Structured pruning: delete whole neurons and channels from a program's graph."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch.export import ExportedProgram

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.errors import PruningError
from fleetpress.compression.layers import matrices
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import (
    fisher,
    gradient_stability,
    magnitude,
    random_,
    taylor,
    wanda,
)
from fleetpress.compression.pruning.delete import delete
from fleetpress.compression.pruning.labels import Atoms
from fleetpress.compression.pruning.method import PruningMethod, ScoreContext
from fleetpress.compression.pruning.select import PruneOptions, check, choose
from fleetpress.compression.pruning.structure import STRUCTURES
from fleetpress.compression.pruning.units import UnitGroup, Units, find_units, output_axis
from fleetpress.compression.statistics import NeuronStatistics

__all__ = [
    "PRUNERS",
    "STRUCTURES",
    "PruneOptions",
    "PruneResult",
    "PruningMethod",
    "UnitGroup",
    "Units",
    "delete",
    "find_units",
    "prune",
    "removed_with",
]

PRUNERS: dict[str, PruningMethod] = {
    "gradient_stability": gradient_stability.METHOD,
    "magnitude": magnitude.METHOD,
    "random": random_.METHOD,
    "taylor": taylor.METHOD,
    "fisher": fisher.METHOD,
    "wanda_structured": wanda.METHOD,
}


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What to delete: `removed` holds the original's output units by layer, coupled layers included; `delete` does it.

    `skipped` says why a layer that was asked for keeps all its units, `units` how many each had.
    """

    removed: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str]
    units: Mapping[str, int]


def prune(
    program: ExportedProgram,
    options: PruneOptions,
    statistics: Mapping[str, NeuronStatistics] | None = None,
    seed: int = 0,
    *,
    inputs: Mapping[str, InputStatistics] | None = None,
    whole: Mapping[str, int] | None = None,
) -> PruneResult:
    """Choose the units to delete; the same arguments give the same choice.

    `statistics` are those of gradients by layer, `inputs` those of what layers read by the weight's state name. In a
    round of an iterative schedule `whole` tells how many units each group had in the beginning: `sparsity` is the share
    of those that is gone afterwards, which may be reached already.

    Raises MethodError for options that do not fit the method, TargetError for a target without a layer and PruningError
    when nothing can be deleted.
    """
    check(options, tuple(PRUNERS))
    method = PRUNERS[options.method]
    units = find_units(program, options.targets, options.ignore, options.structure)
    if not units.groups:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in units.skipped.items())
        raise PruningError(f"no unit can be deleted: {reasons or 'the program has no Linear or Conv layer'}")
    context = ScoreContext(
        values=tensors(program),
        layers=units.layers,
        statistics=statistics or {},
        seed=seed,
        inputs=inputs or {},
    )
    removed = removed_with(units, choose(units, method, options, context, whole))
    if not removed and whole is None:
        count = sum(group.count for group in units.groups)
        how = f"sparsity {options.sparsity} is"
        if options.sparsity is None:
            how = "the shares of `layers` are" if options.layers else "the thresholds are"
        raise PruningError(f"{how} too small to delete any of the {count} units; raise it")
    return PruneResult(removed=removed, skipped=dict(units.skipped), units=dict(units.totals))


def removed_with(units: Units, classes: Atoms) -> dict[str, tuple[int, ...]]:
    """Output units by layer that go when these classes of units go, as `delete` takes them."""
    gone = units.coupling.among(classes)
    reached = {part for group in units.groups for part in group.members}
    removed = {}
    for name, layer in units.owners.items():
        axis = output_axis(units.coupling, layer)
        if axis is not None and gone[axis].any() and any(part.name in reached for part in matrices(layer)):
            removed[name] = tuple(np.flatnonzero(gone[axis]).tolist())
    return removed
