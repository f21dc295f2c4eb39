"""The units of a program that can be deleted: neurons and channels, each with everything coupled to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch.export import ExportedProgram

from fleetpress.compression.layers import RECURRENT_KINDS, layers, matrices
from fleetpress.compression.pruning.coupling import coupling
from fleetpress.compression.pruning.labels import Atoms, Coupling, Mask, components
from fleetpress.compression.pruning.structure import reading
from fleetpress.compression.selection import Layer, matches, select

PRUNABLE_KINDS = (
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
)


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Layers whose units go together, as the convolutions of a residual stage do.

    `members[layer]` tells for each output unit of the layer which unit of the group it belongs to, -1 for one that must
    stay; a recurrent layer has an entry for each of its weight matrices, whose rows are counted. `classes` are the
    units' classes in the program's coupling.
    """

    name: str
    members: Mapping[str, Atoms]
    classes: Atoms

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers in the order of their first use."""
        return tuple(self.members)

    @property
    def count(self) -> int:
        """How many units could be deleted."""
        return len(self.classes)


@dataclass(frozen=True, kw_only=True)
class Units:
    """What can be deleted, layer by layer, and why the rest cannot; `totals` counts each layer's output units.

    `owners` are the layers that were looked at, `layers` those of the groups' members.
    """

    groups: tuple[UnitGroup, ...]
    skipped: Mapping[str, str]
    totals: Mapping[str, int]
    owners: Mapping[str, Layer]
    layers: Mapping[str, Layer]
    coupling: Coupling
    unused_ignores: tuple[str, ...] = ()


def unit_layers(program: ExportedProgram, structure: Iterable[str] = ()) -> dict[str, Layer]:
    """Layers whose output units are neurons or channels, and hidden units if `structure` says so, by name."""
    kinds = (*PRUNABLE_KINDS, *(RECURRENT_KINDS if reading(structure).recurrent else ()))
    return {layer.name: layer for layer in layers(program) if layer.kind in kinds}


def output_axis(found: Coupling, layer: Layer) -> Atoms | None:
    """Labels of a layer's output units; None for a layer that has just one."""
    if layer.kind in RECURRENT_KINDS:
        return found.stored[layer.weights[1]][1]
    return found.stored[layer.weights[0]][layer.axis]


def find_units(
    program: ExportedProgram,
    targets: Iterable[str] = (),
    ignore: Iterable[str] = (),
    structure: Iterable[str] = (),
) -> Units:
    """All units that may be deleted from the layers that `targets` name and `ignore` does not.

    `structure` names the kinds of units (`STRUCTURES`); without it channels and heads are meant. A unit with a member
    in a layer that was not chosen stays: nothing is deleted behind the user's back.
    Raises TargetError for a target that matches no layer and MethodError for an unknown structure.
    """
    asked = reading(structure)
    found = coupling(program, asked)
    ignore = tuple(ignore)
    known = unit_layers(program, asked.kinds)
    selection = select(
        layers(program), targets, ignore, kinds=PRUNABLE_KINDS + (RECURRENT_KINDS if asked.recurrent else ())
    )
    chosen = {layer.name: layer for layer in selection.layers if layer.name in known}
    skipped = {
        layer.name: f"units of a {layer.kind} layer cannot be deleted"
        for layer in selection.layers
        if layer.name not in known
    }
    held = {**_other_kinds(found, chosen, asked.kinds), **_held_back(found, known, chosen, ignore)}
    stays = found.among(np.array(list(held), dtype=np.int64))
    usable: dict[str, dict[str, tuple[Atoms, Mask]]] = {}
    for name, layer in chosen.items():
        axis = output_axis(found, layer)
        if axis is None:
            skipped[name] = "has one unit only"
            continue
        free = found.free(axis) & ~stays[axis]
        if free.any():
            rows = {part.name: _rows(found, layer, part) for part in matrices(layer)}
            usable[name] = {
                part: (found.classes(row), found.free(row) & ~stays[row]) for part, row in rows.items()
            }
        else:
            skipped[name] = held.get(int(found.roots[axis[0]])) or found.reason(int(axis[0]))
    return Units(
        groups=_groups(usable),
        skipped={layer.name: skipped[layer.name] for layer in selection.layers if layer.name in skipped},
        totals={name: _width(program, layer) for name, layer in chosen.items()},
        owners=chosen,
        layers={part.name: part for layer in known.values() for part in matrices(layer)},
        coupling=found,
        unused_ignores=selection.unused_ignores,
    )


def _rows(found: Coupling, layer: Layer, part: Layer) -> Atoms:
    """Labels of the rows of one of a layer's matrices."""
    axis = output_axis(found, layer) if part is layer else found.stored[part.weights[0]][part.axis]
    assert axis is not None, "hidden units have more rows than one"
    return axis


def _width(program: ExportedProgram, layer: Layer) -> int:
    if layer.kind in RECURRENT_KINDS:
        return int(program.state_dict[layer.weights[1]].shape[1])
    return (
        int(program.state_dict[layer.weights[0]].shape[layer.axis])
        if layer.weights[0] in program.state_dict
        else 0
    )


def _held_back(
    found: Coupling, known: Mapping[str, Layer], chosen: Mapping[str, Layer], ignore: tuple[str, ...]
) -> dict[int, str]:
    """Classes that must stay for other reasons than an operator's, with the reason."""
    held: dict[int, str] = {}
    for axis in found.axes():
        classes = found.classes(axis)
        if (classes == classes[0]).all():
            held.setdefault(
                int(classes[0]), "all its units belong together, so that none can go without the others"
            )
    for name, layer in known.items():
        axis_of_layer = output_axis(found, layer)
        if name not in chosen and axis_of_layer is not None:
            word = (
                "is ignored" if any(matches(layer, entry) for entry in ignore) else "is not among the targets"
            )
            for root in np.unique(found.classes(axis_of_layer)):
                held.setdefault(int(root), f"coupled with {name}, which {word}")
    return held


def _other_kinds(found: Coupling, chosen: Mapping[str, Layer], kinds: tuple[str, ...]) -> dict[int, str]:
    """Classes whose units are of a structure that was not asked for."""
    held: dict[int, str] = {}
    axes = [axis for layer in chosen.values() if (axis := output_axis(found, layer)) is not None]
    for axis in axes if kinds else ():
        for root, kind in zip(found.classes(axis).tolist(), found.kinds(axis), strict=True):
            if kind not in kinds:
                held.setdefault(root, f"its units are of structure {kind}, which is not asked for")
    return held


def _groups(layers_found: Mapping[str, Mapping[str, tuple[Atoms, Mask]]]) -> tuple[UnitGroup, ...]:
    """Layers that share a unit, however indirectly, are one group."""
    usable = {part: entry for parts in layers_found.values() for part, entry in parts.items()}
    if not usable:
        return ()
    owner_of = {part: name for name, parts in layers_found.items() for part in parts}
    names = list(usable)
    roots = [classes[mask] for classes, mask in usable.values()]
    every, place = np.unique(np.concatenate(roots), return_inverse=True)
    owner = np.repeat(np.arange(len(names)), [len(item) for item in roots])
    linked = components(len(names) + len(every), owner, place + len(names))[: len(names)]
    groups = []
    for first in dict.fromkeys(linked.tolist()):
        inside = [name for name, link in zip(names, linked, strict=True) if link == first]
        joined = np.concatenate([usable[name][0][usable[name][1]] for name in inside])
        _, seen = np.unique(joined, return_index=True)
        classes = joined[np.sort(seen)]  # in the order of the first layer's units
        order = np.argsort(classes)
        members = {}
        for name in inside:
            layer_classes, mask = usable[name]
            spots = order[np.searchsorted(classes[order], np.where(mask, layer_classes, classes[0]))]
            members[name] = np.where(mask, spots, -1)
        groups.append(UnitGroup(name=owner_of[inside[0]], members=members, classes=classes))
    return tuple(groups)
