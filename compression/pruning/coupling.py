"""Read a program's graph once and say which indices of which tensors belong together."""

from dataclasses import replace

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from fleetpress.compression.program import STORED, aliases, tensors
from fleetpress.compression.pruning.labels import Axis, Coupling, Labelling, Labels
from fleetpress.compression.pruning.rules import apply_rule, plain
from fleetpress.compression.pruning.structure import Reading

AS_EVER = Reading()
_READINGS = 4


def coupling(program: ExportedProgram, reading: Reading = AS_EVER) -> Coupling:
    """Labels and classes of everything in the program; a function of its arguments alone.

    Where a dim is split (attention heads, channel shuffles) either factor can carry the units. The likelier one is
    tried first; when what follows holds it back, or it is not what was asked for, the graph is read again with the
    other one.
    """
    turns: dict[str, int] = {}
    for _ in range(_READINGS):
        flow, stored = _read(program, turns, reading)
        found = replace(flow.resolve(), stored=stored)
        unwanted = found.marked.get(reading.unwanted or "", np.zeros(len(found.roots), np.bool_))
        useless = [
            split.node
            for split in flow.splits
            if split.more
            and (
                not found.free(split.axis).all()
                or (found.classes(split.axis) == found.roots[split.axis[0]]).all()
                or unwanted[split.axis].any()
            )
        ]
        if not useless:
            break
        for name in dict.fromkeys(useless):
            turns[name] = turns.get(name, 0) + 1
    return found


def _read(
    program: ExportedProgram, turns: dict[str, int], reading: Reading
) -> tuple[Labelling, dict[str, Labels]]:
    flow = Labelling(turns, reading)
    signature = program.graph_signature
    names = {spec.arg.name: spec.target for spec in signature.input_specs if spec.kind in STORED}
    values = tensors(program)
    owners = aliases(values)
    stored: dict[str, Labels] = {}
    unused = idle(program.graph) if reading.kinds else set()
    for node in program.graph.nodes:
        if node in unused:
            flow.values[node.name] = plain(node.meta.get("val"))
        elif node.op == "placeholder" and (name := names.get(node.name)) is not None:
            owner = owners.get(name, name)
            stored[name] = (
                stored[owner] if owner in stored else tuple(_dim(flow, s) for s in values[name].shape)
            )
            flow.values[node.name] = stored[name]
        elif node.op == "call_function":
            flow.values[node.name] = apply_rule(flow, node)
        elif node.op == "output":
            _outputs(flow, program, node, stored)
        else:
            flow.values[node.name] = plain(node.meta.get("val"))
    return flow, stored


def idle(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Nodes whose results nothing that counts reads, such as the mean of attention weights that nobody asked for."""
    found: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.is_impure() and all(user in found for user in node.users):
            found.add(node)
    return found


def _dim(flow: Labelling, size: int) -> Axis:
    return flow.fresh(size) if size > 1 else None


def _outputs(
    flow: Labelling, program: ExportedProgram, node: torch.fx.Node, stored: dict[str, Labels]
) -> None:
    """What a caller sees stays; what is written back to a buffer goes with it."""
    for spec, item in zip(program.graph_signature.output_specs, node.args[0], strict=True):  # type: ignore[arg-type]
        labels = flow.of(item)
        if spec.kind is OutputKind.BUFFER_MUTATION and spec.target in stored:
            for axis, kept in zip(labels, stored[spec.target], strict=True):
                flow.unite(axis, kept, node)
        else:
            for axis in labels:
                flow.pin(axis, node, "an output of the model")
