"""What deleting shares of every group of coupled units would cost in loss, and which layers shrink with them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.joint_allocation import Part
from fleetpress.compression.layers import layers
from fleetpress.compression.meter import Meter
from fleetpress.compression.pruning import PRUNERS, UnitGroup, Units, delete, find_units, removed_with
from fleetpress.compression.pruning.coupling import idle
from fleetpress.compression.pruning.method import ScoreContext
from fleetpress.compression.unit_sensitivity import carried, lowest, parts_of

from .choices import STRUCTURES

_SHARES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.87)
_PROBED = 3  # of these: where a measurement corrects the estimate
_TRUSTED = 8.0  # an estimate is corrected by no more than this factor
_ROUNDING = 1e-6  # so that the share of so many units means that many again


def trusted(measured: float, expected: float) -> float:
    """Measured over expected, within bounds; 1 where nothing was expected."""
    return min(_TRUSTED, max(1 / _TRUSTED, measured / expected)) if expected > 0 else 1.0


def sense_units(
    program: ExportedProgram, values: Mapping[str, Tensor], known: CalibrationStatistics, meter: Meter
) -> dict[str, Any]:
    """`deletions` by group of units, from none to most of them, the `parts` of every layer that shrink with groups, and
    the layers that are `idle`: nothing reads their outputs.

    The least important units go first. A group of layers that were observed is estimated and corrected by one
    measurement; others are measured at every share, units of small weights first.
    """
    units = find_units(program, structure=STRUCTURES)
    pricing = _Pricing(program=program, units=units, values=values, known=known, meter=meter)
    deletions = {group.name: pricing.deletions(group) for group in units.groups}
    unread = {node.name for node in idle(program.graph)}
    return {
        "idle": [layer.name for layer in layers(program) if unread.issuperset(layer.nodes)],
        "deletions": {name: found for name, found in deletions.items() if len(found) > 1},
        "parts": {layer.name: plain_parts(parts_of(units, layer, values)) for layer in layers(program)},
    }


@dataclass(frozen=True, kw_only=True)
class _Pricing:
    program: ExportedProgram
    units: Units
    values: Mapping[str, Tensor]
    known: CalibrationStatistics
    meter: Meter

    def deletions(self, group: UnitGroup) -> list[dict[str, float]]:
        """Shares of the group's units with what deleting them would cost; none if they cannot be deleted."""
        counts = sorted({math.floor(share * group.count) for share in _SHARES})
        try:
            increases = self._increases(group, counts)
        except CompressionError:  # what cannot be taken apart keeps its units
            return []
        if not all(map(math.isfinite, increases)):
            return []
        return [
            {"share": share_of(count, group.count), "increase": increase}
            for count, increase in zip(counts, increases, strict=True)
        ]

    def _increases(self, group: UnitGroup, counts: list[int]) -> list[float]:
        scores = carried(self.units, group, self.values, self.known)
        if scores is None:
            scores = by_magnitude(self.units, group, self.values)
            return [self._measured(group, scores, count) if count else 0.0 for count in counts]
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), scores.sort().values.cumsum(0)]).tolist()
        probed = counts[min(_PROBED, len(counts) - 1)]
        factor = trusted(self._measured(group, scores, probed), sums[probed]) if probed else 1.0
        return [factor * sums[count] for count in counts]

    def _measured(self, group: UnitGroup, scores: Tensor, count: int) -> float:
        gone = removed_with(self.units, group.classes[lowest(scores, count)])
        return self.meter.increase_of(delete(self.program, gone, STRUCTURES))


def by_magnitude(units: Units, group: UnitGroup, values: Mapping[str, Tensor]) -> Tensor:
    """How large the weights of each unit of the group are: which go first where nothing else is known of them."""
    context = ScoreContext(values=dict(values), layers=units.layers, statistics={}, seed=0)
    return PRUNERS["magnitude"].score(context, group)


def plain_parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts as a record holds them."""
    return [{"weight": part.weight, "axes": [list(axis) for axis in part.axes]} for part in parts]


def share_of(count: int, units: int) -> float:
    """The share of so many of the units, a little more so that it means that many again."""
    return min(math.ceil(count / units / _ROUNDING) * _ROUNDING, 0.999999) if count else 0.0
