"""What deleting units of a program would cost and save: the loss that they carry, and their shares of every weight."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.joint_allocation import Part
from fleetpress.compression.program import aliases
from fleetpress.compression.pruning.labels import Atoms
from fleetpress.compression.pruning.method import added
from fleetpress.compression.pruning.units import UnitGroup, Units
from fleetpress.compression.quantization.weight import to_rows
from fleetpress.compression.selection import Layer
from fleetpress.compression.sensitivity import unit_increases


def carried(
    units: Units, group: UnitGroup, values: Mapping[str, Tensor], known: CalibrationStatistics
) -> Tensor | None:
    """By how much the loss is expected to grow for each unit that goes alone, float64 [units of the group].

    None if a layer of the group was not observed. Coupled rows add up: each writes an output of its own.
    """
    owners = aliases(dict(values))
    found: dict[str, Tensor] = {}
    for name in group.layers:
        layer = units.layers[name]
        weight = layer.weights[0]
        statistics = known.weights.get(owners.get(weight, weight))
        if statistics is None or statistics.output_squares is None:
            return None
        found[name] = unit_increases(-to_rows(values[weight].detach(), layer.axis), statistics, known.samples)
    return added(group, found)


def parts_of(units: Units, layer: Layer, values: Mapping[str, Tensor]) -> tuple[Part, ...]:
    """A layer's weights as shares of its entries, each with the groups whose units lie along its axes."""
    names = list(dict.fromkeys(aliases(dict(values)).get(name, name) for name in layer.weights))
    total = sum(values[name].numel() for name in names)
    return tuple(
        Part(weight=values[name].numel() / total, axes=tuple(_axes(units, name))) for name in names if total
    )


def _axes(units: Units, weight: str) -> list[tuple[str, float]]:
    """Of each labelled axis of a weight the group that holds most of its entries, and their share."""
    found = []
    labels = units.coupling.stored.get(weight)
    for axis in labels if isinstance(labels, list | tuple) else ():
        if axis is None:
            continue
        shares = {group.name: _share(units.coupling.classes(axis), group) for group in units.groups}
        name = max(shares, key=lambda one: shares[one], default=None)
        if name is not None and shares[name] > 0:
            found.append((name, shares[name]))
    return found


def _share(classes: Atoms, group: UnitGroup) -> float:
    return float(np.isin(classes, group.classes).mean())


def lowest(scores: Tensor, count: int) -> Atoms:
    """Places of the `count` lowest scores, the first of them among equals."""
    order: Atoms = torch.sort(scores, stable=True).indices[:count].numpy()
    return order
