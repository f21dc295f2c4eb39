"""Delete units from a program: rows, biases, normalization entries and every consumer's inputs."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.export import ExportedProgram

from fleetpress.compression.errors import PruningError
from fleetpress.compression.program import ProgramEditor, aliases
from fleetpress.compression.pruning.coupling import coupling, idle
from fleetpress.compression.pruning.labels import Atoms, Coupling, Labels, Mask
from fleetpress.compression.pruning.rewrite import Surgery, rewrite
from fleetpress.compression.pruning.structure import reading
from fleetpress.compression.pruning.units import output_axis, unit_layers


def delete(
    program: ExportedProgram, removed: Mapping[str, Sequence[int]], structure: Iterable[str] = ()
) -> ExportedProgram:
    """The program without the given output units (indices by layer) and without all that is coupled to them.

    The result computes what `program` computes with these units held at zero where others read them, and depends on
    nothing but the arguments; `structure` is the one that the units were chosen with: with one, operators whose results
    nothing reads go, too, and what only they read. Units of the structure
    `normalized` are not zero for the mean of a layer or group norm, which is that of what is left. Layers that are
    coupled to the named ones need not be named; those that are must be named in full. Raises PruningError for units
    that do not exist, must stay, or leave a layer empty.
    """
    asked = reading(structure)
    found = coupling(program, asked)
    gone = leaving(program, found, removed)
    for axis in found.axes():
        if gone[axis].all():
            raise PruningError(
                f"nothing would be left of {_where(found, axis)}; keep at least one of its units"
            )
    editor = ProgramEditor(program)
    unread: list[str] = []
    if asked.kinds:
        read = [name for name, node in editor.placeholders.items() if node.users]
        for node in sorted(idle(editor.graph), reverse=True):
            editor.graph.erase_node(node)
        unread = [name for name in read if not editor.placeholders[name].users]
    _shrink_tensors(editor, found, gone)
    surgery = Surgery(found, gone, editor)
    for node in editor.graph.nodes:
        rewrite(surgery, node)
    for name in unread:
        editor.drop(name)
    return editor.build()


def leaving(program: ExportedProgram, found: Coupling, removed: Mapping[str, Sequence[int]]) -> Mask:
    """For every atom of the program's coupling whether it leaves. Raises PruningError as `delete` does."""
    known = unit_layers(program, found.reading.kinds)
    axes: dict[str, Atoms] = {}
    chosen: list[Atoms] = [np.empty(0, np.int64)]
    for name, indices in removed.items():
        axis = output_axis(found, known[name]) if name in known else None
        if axis is None:
            raise PruningError(f"{name}: is no layer with units that can be deleted")
        if any(not 0 <= index < len(axis) for index in indices):
            raise PruningError(f"{name}: units {list(indices)} are not all among its {len(axis)} units")
        axes[name] = axis
        atoms = axis[np.asarray(indices, dtype=np.int64)]
        for index in np.flatnonzero(~found.free(atoms)).tolist():
            raise PruningError(f"{name}: unit {indices[index]} must stay; {found.reason(int(atoms[index]))}")
        chosen.append(found.classes(atoms))
    gone = found.among(np.concatenate(chosen))
    for name, indices in removed.items():
        missing = sorted(set(np.flatnonzero(gone[axes[name]]).tolist()) - set(indices))
        if missing:
            raise PruningError(
                f"{name}: units {missing} go together with others that are deleted; delete them, too"
            )
    return gone


def _where(found: Coupling, axis: Atoms) -> str:
    for name, labels in found.stored.items():
        if any(axis is item for item in labels):
            return name
    nodes = (
        name
        for name, value in found.values.items()
        for labels in _each(value)
        if any(axis is i for i in labels)
    )
    return next(nodes)


def _each(value: object) -> list[Labels]:
    return value if isinstance(value, list) else [value or ()]  # type: ignore[list-item]


def _shrink_tensors(editor: ProgramEditor, found: Coupling, gone: Mask) -> None:
    """Tied tensors become one new tensor, so they stay tied."""
    owners = aliases(editor.values)
    made: dict[str, torch.Tensor] = {}
    for name, labels in found.stored.items():
        dims = [(dim, axis) for dim, axis in enumerate(labels) if axis is not None and gone[axis].any()]
        if not dims:
            continue
        owner = owners.get(name, name)
        if owner not in made:
            old = editor.values[name]
            value = old.detach()
            for dim, axis in dims:
                value = value.index_select(dim, torch.from_numpy(np.flatnonzero(~gone[axis])))
            made[owner] = (
                torch.nn.Parameter(value, old.requires_grad) if isinstance(old, torch.nn.Parameter) else value
            )
        editor.set(name, made[owner])
