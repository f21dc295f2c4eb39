"""The opposite of `integer_nodes`: layers on integer kernels become float layers over the dequantized weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fleetpress.compression.program import ProgramEditor
from fleetpress.compression.quantization.integer_nodes import INTEGERS, OFFSET
from fleetpress.compression.quantization.unpack_nodes import END, SCALE
from fleetpress.compression.quantization.values import compute_dtype

aten = torch.ops.aten
_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True, kw_only=True)
class _Use:
    """One product with a stored weight: its nodes, the float input, the bias, and where the result is."""

    made_by: set[fx.Node]
    x: fx.Node
    bias: fx.Node | None
    end: fx.Node
    windows: list[tuple[int, int]]  # size and step of each dimension of a convolution
    padding: list[int]  # as constant_pad_nd takes it
    turned: bool  # the weight is [units, columns]


def fold_integers(editor: ProgramEditor) -> None:
    """Give every layer that `IntegerNodes` put on integer kernels its float operator and weight back."""
    for stream in [name for name in editor.values if name.endswith(INTEGERS)]:
        name = stream.removesuffix(INTEGERS)
        if not {name + SCALE, name + OFFSET} <= editor.values.keys():
            continue
        codes = editor.placeholders[stream]
        uses = list(_uses(codes, editor.placeholders[name + OFFSET]))
        scale = editor.values[name + SCALE]
        for use in uses:
            with editor.graph.inserting_before(use.end):
                result = _float_operator(editor.graph, use, codes)
            result.meta["val"] = use.end.meta["val"]
            use.end.replace_all_uses_with(result)
            result.name = use.end.name  # the signature names outputs; the old node goes below
        editor.fold(codes, name, _weight(editor.values[stream], scale, uses[0]), beside=stream)
        spent = set().union(*(use.made_by for use in uses))
        for node in reversed(list(editor.graph.nodes)):
            if node in spent and not node.users:
                editor.graph.erase_node(node)
        for part in (INTEGERS, SCALE, OFFSET):
            editor.drop(name + part)


def _uses(codes: fx.Node, offset: fx.Node) -> Iterator[_Use]:
    for user in list(codes.users):
        turned = user.target is aten.t.default
        for product in list(user.users) if turned else [user]:
            convolves = product.args[0] is codes
            made_by = {user, product}
            end = product
            bias = None
            while end.target is not END:
                end = next(iter(end.users))
                made_by.add(end)
                if end.target is aten.addcmul.default:
                    bias = _bias(end.args[0], offset, made_by)
                    _behind(_node(end.args[2]), made_by)
            made_by.update(node for node in _sizes(end))
            x, windows, padding = _input(product.args[1] if convolves else product.args[0], made_by)
            if convolves and not windows:
                windows = [(1, 1)] * (x.meta["val"].dim() - 2)
            yield _Use(
                made_by=made_by,
                x=x,
                bias=bias,
                end=end,
                windows=windows,
                padding=padding,
                turned=turned or convolves,
            )


def _input(start: Any, made_by: set[fx.Node]) -> tuple[fx.Node, list[tuple[int, int]], list[int]]:
    """The float tensor that an operand of a product was rounded from, and how its patches were gathered."""
    windows: list[tuple[int, int]] = []
    padding: list[int] = []
    node, rounded = start, False
    while not rounded or node.target is aten.to.dtype:
        made_by.add(node)
        if node.target is aten.unfold.default:
            windows.insert(0, (node.args[2], node.args[3]))
        elif node.target is aten.constant_pad_nd.default:
            padding = list(node.args[1])
        elif node.target is aten.rsub.Scalar:
            rounded = True
            inner = node.args[0]
            if inner.target is not aten.to.dtype or inner.args[0].meta["val"].dtype == torch.float32:
                return inner, windows, padding
        node = node.args[0]
    return node, windows, padding


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _bias(shift: Any, offset: fx.Node, made_by: set[fx.Node]) -> fx.Node | None:
    """What was added besides the stored offset."""
    found = _behind(shift, made_by)
    return next((node for node in found if node is not offset), None)


def _behind(node: fx.Node, made_by: set[fx.Node]) -> list[fx.Node]:
    """The placeholders that a value is made of; the operators join `made_by`."""
    if node.op == "placeholder":
        return [node]
    made_by.add(node)
    return [found for one in node.all_input_nodes for found in _behind(one, made_by)]


def _sizes(end: fx.Node) -> list[fx.Node]:
    """Nodes that only tell the sizes of the last reshape."""
    node, found = end, []
    while node.target is not aten._int_mm.default:
        found += [one for one in node.all_input_nodes if one.target is aten.sym_size.int]
        node = node.args[1] if node.target is aten.addcmul.default else node.args[0]  # type: ignore[assignment]
    return found


def _float_operator(graph: fx.Graph, use: _Use, weight: fx.Node) -> fx.Node:
    if not use.windows:
        if use.turned:
            args = (use.x, weight) if use.bias is None else (use.x, weight, use.bias)
            return graph.call_function(aten.linear.default, args)
        if use.bias is None:
            return graph.call_function(aten.matmul.default, (use.x, weight))
        return graph.call_function(aten.addmm.default, (use.bias, use.x, weight))
    dims, x = len(use.windows), use.x
    pairs = list(reversed([tuple(use.padding[at : at + 2]) for at in range(2, len(use.padding), 2)]))
    if all(before == after for before, after in pairs):
        padding = [pair[0] for pair in pairs] or [0] * dims
    else:
        padding = [0] * dims
        x = graph.call_function(aten.constant_pad_nd.default, (x, use.padding[2:]))
        sizes = list(use.x.meta["val"].shape)
        for dim, (before, after) in enumerate(pairs):
            sizes[dim + 2] += before + after
        x.meta["val"] = use.x.meta["val"].new_empty(sizes)
    stride = [step for _, step in use.windows]
    return graph.call_function(_CONVOLUTIONS[dims], (x, weight, use.bias, stride, padding, [1] * dims, 1))


def _weight(codes: Tensor, scale: Tensor, use: _Use) -> Tensor:
    """The dequantized weight in its own shape and dtype."""
    dtype = compute_dtype(scale.dtype)
    value = (codes.to(dtype) * (scale.to(dtype)[:, None] if use.turned else scale.to(dtype))).to(scale.dtype)
    if not use.windows:
        return value
    kernel = [size for size, _ in use.windows]
    return value.view(value.shape[0], *kernel, -1).movedim(-1, 1).contiguous()
