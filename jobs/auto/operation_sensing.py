"""What narrowing every group of units would cost in loss, and which operations would go: measured, group by group."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.meter import Meter
from fleetpress.compression.pruning import UnitGroup, Units, delete, find_units, removed_with
from fleetpress.compression.pruning.compensate import compensate, with_compensation
from fleetpress.compression.unit_operations import operations_of
from fleetpress.compression.unit_sensitivity import carried, lowest

from .choices import STRUCTURES
from .unit_sensing import by_magnitude, plain_parts, share_of

SHARES = (*(0.05 * step for step in range(19)), 0.925, 0.95, 0.97)
_PROBED = (0.3, 0.6, 0.75, 0.87, 0.93, 0.97)  # of these shares what is measured, in nets of few groups
_FEWER = (0.3, 0.6, 0.87)  # the same in nets of many
_FEW_GROUPS = 12
_NOTHING = 1e-7  # of the loss: as good as no increase


def sense_operations(
    program: ExportedProgram,
    values: Mapping[str, Tensor],
    known: CalibrationStatistics,
    meter: Meter,
    *,
    index: int = 0,
    count: int = 1,
) -> dict[str, Any]:
    """`narrowings` by group of units, from none to nearly all of them, and the `operations` that shrink with groups.

    Every `count`-th group from the `index`-th on is looked at; operations are told with the first.

    Some shares of each group are deleted alone, what reads them is refitted, and the outputs are measured; between
    two shares the loss is taken to grow exponentially. Least squares hide the loss of many units and of no more:
    where that cliff lies decides how wide a layer must be, and no second-order estimate sees it.
    """
    units = find_units(program, structure=STRUCTURES)
    probing = _Probing(program=program, units=units, values=values, known=known, meter=meter)
    narrowings = {group.name: probing.narrowings(group) for group in units.groups[index::count]}
    operations = operations_of(program, units, values, STRUCTURES) if index == 0 else []
    return {
        "narrowings": {name: found for name, found in narrowings.items() if len(found) > 1},
        "operations": [{"macs": one.macs, "parts": plain_parts(one.parts)} for one in operations],
    }


@dataclass(frozen=True, kw_only=True)
class _Probing:
    program: ExportedProgram
    units: Units
    values: Mapping[str, Tensor]
    known: CalibrationStatistics
    meter: Meter

    def narrowings(self, group: UnitGroup) -> list[dict[str, float]]:
        """Shares of the group's units with what deleting them would cost; none if they cannot be deleted."""
        shares = _PROBED if len(self.units.groups) <= _FEW_GROUPS else _FEWER
        probed = sorted({math.floor(share * group.count) for share in shares} - {0})
        scores = self._scores(group)
        try:
            measured = [self._measured(group, scores, count) for count in probed]
        except CompressionError:  # what cannot be taken apart keeps its units
            return []
        if not probed or not all(map(math.isfinite, measured)):
            return []
        counts = sorted({math.floor(share * group.count) for share in SHARES})
        counts = [count for count in counts if count <= probed[-1]]
        return [
            {"share": share_of(count, group.count), "increase": increase}
            for count, increase in zip(counts, _between(probed, measured, counts), strict=True)
        ]

    def _scores(self, group: UnitGroup) -> Tensor:
        scores = carried(self.units, group, self.values, self.known)
        return by_magnitude(self.units, group, self.values) if scores is None else scores

    def _measured(self, group: UnitGroup, scores: Tensor, count: int) -> float:
        gone = removed_with(self.units, group.classes[lowest(scores, count)])
        inputs = {name: item.inputs for name, item in self.known.weights.items()}
        refitted = compensate(self.program, gone, inputs, "least_squares", STRUCTURES).values
        ways = [self.program, *([with_compensation(self.program, refitted)] if refitted else [])]
        return min(self.meter.increase_of(delete(way, gone, STRUCTURES)) for way in ways)


def _between(probed: Sequence[int], measured: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Increases for these counts: never falling, on a logarithmic scale between two that were measured."""
    heights = np.log(np.maximum.accumulate(np.maximum(measured, _NOTHING)))
    found = np.exp(np.interp(counts, [0, *probed], [math.log(_NOTHING), *heights]))
    return [float(one) if count else 0.0 for count, one in zip(counts, found, strict=True)]
