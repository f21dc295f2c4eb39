"""Programs whose graph unpacks their weights: packed integers, scales and zero points are stored instead of floats.

A weight `name` becomes the buffers `name_packed` (the stream of its codes), `name_scale`, if not symmetric
`name_zero_point`, and `name_codebook` where codes are looked up in one; plain ATen operators in front of its first use
derive it from them, bit for bit what `QuantizedWeight.dequantize` gives. So `torch.export.load(file).module()` runs the
program without this package.
A name tied to it becomes a second name of the packed buffer. Of a weight with many zeros `name_packed` holds the codes
that are not zero and `name_mask` where they are; if it is not quantized, `name_values` and `name_mask` take its place.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fleetpress.compression.errors import ProgramError
from fleetpress.compression.program import ProgramEditor, aliases
from fleetpress.compression.quantization.integer_folding import fold_integers
from fleetpress.compression.quantization.integer_nodes import IntegerNodes, integer_buffers
from fleetpress.compression.quantization.packing import pack
from fleetpress.compression.quantization.sparse_weight import SparseFloats, SparseWeight, sparse_floats
from fleetpress.compression.quantization.unpack_nodes import (
    CODEBOOK,
    MASK,
    PACKED,
    SCALE,
    VALUES,
    ZERO_POINT,
    UnpackNodes,
    evaluate,
    find_unpacked,
    scale_shape,
)
from fleetpress.compression.quantization.weight import (
    QuantizedWeight,
    pack_codes,
    packs_zero_points,
    predicted_bytes,
)

__all__ = ["has_integers", "pack_program", "predicted_bytes", "unpack_program"]


def pack_program(
    program: ExportedProgram, quantized: Mapping[str, QuantizedWeight], sparse: Iterable[str] = ()
) -> ExportedProgram:
    """The program with the weights named in `quantized` stored packed, and others in `sparse` without their zeros.

    Its outputs are those of the program over the dequantized weights, bit for bit, except that layers whose weights say
    how their inputs are rounded compute on integer kernels. Tied weights are packed, stored and
    unpacked once: naming one of them packs all. Raises ProgramError for names or shapes that are not the program's.
    """
    editor = ProgramEditor(program)
    for name, given in quantized.items():
        _check(name, given, editor.values)
    nodes, integers = UnpackNodes(editor.graph), IntegerNodes(editor.graph)
    stored = {**_sparse(editor, quantized, sparse), **quantized}
    for owner, (first_use, others) in _owners(editor, stored).items():
        weight = next(stored[name] for name in (owner, *others) if name in stored)
        kernel = weight if isinstance(weight, QuantizedWeight) and weight.input_scale is not None else None
        buffers = _buffers(owner, weight) if kernel is None else integer_buffers(owner, kernel)
        stream = next(iter(buffers)).removeprefix(owner)
        taken = next((name for name in buffers if name in editor.values), None)
        if taken:
            raise ProgramError(f"{owner}: the program already stores a tensor {taken!r}; rename that one")
        if kernel is not None:
            old = editor.placeholders[owner]
            editor.replace(owner, buffers, partial(_on_integers, integers, owner, kernel, old))
            continue
        for name in others:
            editor.placeholders[name].replace_all_uses_with(editor.placeholders[owner])
            editor.replace(name, {name + stream: buffers[owner + stream]}, _first)
        editor.replace(owner, buffers, partial(_unpacked, nodes, owner, weight, first_use))
    return editor.build()


def unpack_program(program: ExportedProgram, *, keep_integers: bool = False) -> ExportedProgram:
    """The program with every packed weight stored as the plain parameter that the graph unpacked at each call.

    The opposite of `pack_program`: same names, shapes, dtypes and outputs as the program had over the dequantized
    weights. Weights that `pack_program` did not pack stay as they are. Layers on integer kernels become float layers,
    whose inputs are not rounded any more, unless `keep_integers` says to leave them.
    """
    editor = ProgramEditor(program)
    if not keep_integers:
        fold_integers(editor)
    suffixes = (PACKED, SCALE, ZERO_POINT, CODEBOOK, MASK, VALUES)
    stored = {
        editor.placeholders[name]: value for name, value in editor.values.items() if name.endswith(suffixes)
    }
    streams = {name: value for name, value in editor.values.items() if name.endswith((PACKED, VALUES))}
    tied = _tied(streams)
    made_by: set[fx.Node] = set()
    spent: list[str] = []
    for stream in streams:
        name = _weight_of(stream)
        part = editor.placeholders.get(name + SCALE, editor.placeholders.get(name + CODEBOOK))
        if stream.endswith(VALUES):
            part = editor.placeholders[stream]
        found = find_unpacked(part, stored) if part is not None else None
        if found is None or not any(editor.placeholders[stream] in node.all_input_nodes for node in found[1]):
            continue
        end, nodes = found
        made_by.update(nodes)
        value = evaluate(nodes, stored)
        editor.fold(end, name, value, beside=stream)
        for other in tied[stream]:
            editor.fold(editor.placeholders[other], _weight_of(other), value, beside=other)
        spent += [name + suffix for suffix in suffixes if name + suffix in editor.values]
        spent += tied[stream]
    for node in reversed(list(editor.graph.nodes)):
        if node in made_by and not node.users:
            editor.graph.erase_node(node)
    for name in spent:
        editor.drop(name)
    return editor.build()


def has_integers(program: ExportedProgram) -> bool:
    """Whether layers of the program run on integer kernels."""
    return any(node.target is torch.ops.aten._int_mm.default for node in program.graph.nodes)


def _check(name: str, weight: QuantizedWeight, values: Mapping[str, Tensor]) -> None:
    if name not in values:
        raise ProgramError(f"{name}: the program stores no such tensor; quantize it from this program")
    if tuple(values[name].shape) != weight.shape or values[name].dtype != weight.dtype:
        raise ProgramError(
            f"{name}: quantized as {weight.dtype} {weight.shape}, but the program holds {values[name].dtype} "
            f"{tuple(values[name].shape)}; quantize it from this program"
        )


def _owners(editor: ProgramEditor, names: Iterable[str]) -> dict[str, tuple[fx.Node, list[str]]]:
    """The weights to pack in the order of their first use, with that use and the names tied to the weight.

    Of tied names the one that is used first owns the weight, since torch.export lets one stand for all.
    """
    order = {node: place for place, node in enumerate(editor.graph.nodes)}
    tied = _tied(editor.values)
    found: dict[str, tuple[fx.Node, list[str]]] = {}
    for name in names:
        group = [name, *tied[name]]
        uses = {user: owner for owner in group for user in editor.placeholders[owner].users}
        if not uses:
            raise ProgramError(f"{name}: the program's graph does not use this weight; add it to `ignore`")
        first_use = min(uses, key=lambda node: order[node])
        owner = uses[first_use]
        found[owner] = (first_use, [other for other in editor.values if other in group and other != owner])
    return dict(sorted(found.items(), key=lambda item: order[item[1][0]]))


def _tied(values: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For every name the others that share its storage, in the order of `values`."""
    first = aliases(values)
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(first.get(name, name), []).append(name)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}


def _first(_: fx.Graph, added: dict[str, fx.Node]) -> fx.Node:
    return next(iter(added.values()))


def _on_integers(
    integers: IntegerNodes,
    name: str,
    weight: QuantizedWeight,
    old: fx.Node,
    _: fx.Graph,
    added: dict[str, fx.Node],
) -> fx.Node:
    integers.replace(weight, {key.removeprefix(name): node for key, node in added.items()}, old)
    return next(iter(added.values()))


def _unpacked(
    nodes: UnpackNodes,
    name: str,
    weight: QuantizedWeight | SparseFloats,
    first_use: fx.Node,
    _: fx.Graph,
    added: dict[str, fx.Node],
) -> fx.Node:
    buffers = {key.removeprefix(name): node for key, node in added.items()}
    if isinstance(weight, SparseFloats):
        return nodes.add_floats(weight, buffers, first_use)
    return nodes.add(weight, buffers, first_use)


def _sparse(
    editor: ProgramEditor, quantized: Mapping[str, QuantizedWeight], names: Iterable[str]
) -> dict[str, QuantizedWeight | SparseFloats]:
    """Those of the named weights that are smaller without their zeros; what is quantized has its form already."""
    tied = _tied(editor.values)
    free = [name for name in names if not {name, *tied[name]} & quantized.keys()]
    found = {name: sparse_floats(editor.values[name]) for name in free}
    return {name: weight for name, weight in found.items() if weight is not None}


def _weight_of(stream: str) -> str:
    return stream.removesuffix(PACKED if stream.endswith(PACKED) else VALUES)


def _buffers(name: str, weight: QuantizedWeight | SparseFloats) -> dict[str, Tensor]:
    if isinstance(weight, SparseFloats):
        return {name + VALUES: weight.values, name + MASK: weight.mask}
    scheme, bits, shape = weight.scheme, weight.scheme.num_bits, scale_shape(weight)
    if isinstance(weight, SparseWeight):
        buffers = {name + PACKED: weight.packed, name + MASK: weight.mask}
    else:
        buffers = {name + PACKED: pack_codes(weight.codes, scheme)}
    if scheme.has_scale:
        buffers[name + SCALE] = weight.scale.reshape(shape)
    if weight.zero_point is not None:
        packs = packs_zero_points(weight.zero_point.numel(), scheme)
        buffers[name + ZERO_POINT] = (
            pack(weight.zero_point, bits) if packs else weight.zero_point.reshape(shape)
        )
    if scheme.codebook_entries:
        assert weight.entries is not None
        buffers[name + CODEBOOK] = weight.entries
    return buffers
