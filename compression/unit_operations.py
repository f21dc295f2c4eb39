"""Which operations of a program go with which of its units: multiply-accumulates of layers, and of attention."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.cost import layer_macs, macs
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.joint_allocation import LayerChoice, Part
from fleetpress.compression.layers import layers
from fleetpress.compression.pruning import delete, removed_with
from fleetpress.compression.pruning.units import Units
from fleetpress.compression.unit_sensitivity import parts_of

_PROBED_SHARE = 0.45  # of a group's units, whose deletion tells what else goes with them


@dataclass(frozen=True, kw_only=True)
class Operations:
    """So many multiply-accumulates of a call, and the `parts` of them that go with groups of units."""

    macs: float
    parts: tuple[Part, ...]


def operations_of(
    program: ExportedProgram, units: Units, values: Mapping[str, Tensor], structure: Iterable[str]
) -> list[Operations]:
    """All multiply-accumulates of one call of the program, in terms that shrink with its groups of units.

    Each layer's shrink as its weights do. Products without weights, such as those of attention, are counted once with
    some units of each group gone: what is missing beside the layers' goes with the group, in proportion.
    """
    structure = tuple(structure)
    own = layer_macs(program)
    found = [
        Operations(macs=own[layer.name], parts=parts_of(units, layer, values))
        for layer in layers(program)
        if own[layer.name]
    ]
    whole = macs(program)
    rest: float = whole - sum(own.values())
    if rest <= 0:
        return found
    for group in units.groups:
        count = math.floor(_PROBED_SHARE * group.count)
        if not count:
            continue
        try:
            smaller = delete(program, removed_with(units, group.classes[:count]), structure)
        except CompressionError:  # what cannot be taken apart keeps its units
            continue
        share = count / group.count
        left = sum(
            one.macs * LayerChoice(options=(), parts=one.parts).left({group.name: share}) for one in found
        )
        gone = min(rest, max(0.0, (left + whole - sum(own.values()) - macs(smaller)) / share))
        if gone >= 1:
            found.append(Operations(macs=gone, parts=(Part(weight=1.0, axes=((group.name, 1.0),)),)))
            rest -= gone
    return [*found, Operations(macs=rest, parts=(Part(weight=1.0),))] if rest > 0 else found
