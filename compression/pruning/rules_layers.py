"""How labels pass through the operators that contract: linear, matmul, convolutions, attention."""

from typing import Any

import numpy as np
import torch
from torch import fx

from fleetpress.compression.arguments import arguments, is_single, operands, size_of
from fleetpress.compression.pruning.labels import Atoms, Axis, Labelling, Labels, Value
from fleetpress.compression.pruning.rules_pointwise import broadcast

aten = torch.ops.aten


def linear(flow: Labelling, node: fx.Node) -> Value:
    args = arguments(node)
    x, weight = flow.of(args["input"]), flow.of(args["weight"])
    contract(flow, node, x[-1], weight[1])
    _same(flow, node, weight[0], args["bias"])
    return (*x[:-1], weight[0])


def matmul(flow: Labelling, node: fx.Node) -> Value:
    left, right = (flow.of(item) for item in operands(node)[:2])
    contract(flow, node, left[-1], right[max(len(right) - 2, 0)])
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    batch = broadcast(flow, node, [(operands(node)[0], left[:-2]), (operands(node)[1], right[:-2])], drop=2)
    if len(batch) > 0 and _computed(operands(node)[:2]):
        _mark(flow, batch, (*left[-2:], *columns))
    return (*batch, *rows, *columns)


def _computed(factors: Any) -> bool:
    """Whether a product is one of an attention: neither factor is stored."""
    return all(isinstance(item, fx.Node) and item.op != "placeholder" for item in factors)


def _mark(flow: Labelling, heads: Labels, inside: Labels) -> None:
    for axis in heads:
        flow.mark(axis, "head")
    for axis in inside:
        flow.mark(axis, "head_dim")


def addmm(flow: Labelling, node: fx.Node) -> Value:
    bias, left, right = operands(node)[:3]
    one, other = flow.of(left), flow.of(right)
    contract(flow, node, one[-1], other[-2])
    batch = tuple(flow.unite(a, b, node) for a, b in zip(one[:-2], other[:-2], strict=True))
    product = (*batch, one[-2], other[-1])
    return broadcast(flow, node, [(node, product), (bias, flow.of(bias))])


def contract(flow: Labelling, node: fx.Node, one: Axis, other: Axis) -> None:
    """A sum over products: deleting an index of both leaves its term out, as if either were zero."""
    flow.unite(one, other, node)


def convolution(flow: Labelling, node: fx.Node) -> Value:
    args = arguments(node)
    x, weight = flow.of(args["input"]), flow.of(args["weight"])
    groups = int(args["groups"])
    channel = len(weight) - len(x)  # 0 with a batch dim; an unbatched input has its channels first
    place = 1 if channel == 0 else 0
    inputs, outputs = x[place], weight[0]
    if groups == 1:
        contract(flow, node, inputs, weight[1])
    elif weight_size(args, 1) == 1 and outputs is not None:
        _follow_groups(flow, node, inputs, outputs.reshape(groups, -1))
    else:
        _same_in_every_group(flow, node, inputs, weight[1], groups)
        if outputs is not None:
            flow.unite_rows(outputs.reshape(groups, -1).T)
    _kernel(flow, node, x[place + 1 :], weight[2:])
    _same(flow, node, outputs, args["bias"])
    return (*x[:place], outputs, *(None for _ in x[place + 1 :]))


def transposed_convolution(flow: Labelling, node: fx.Node) -> Value:
    args = arguments(node)
    x, weight = flow.of(args["input"]), flow.of(args["weight"])
    groups = int(args["groups"])
    place = 1 if len(weight) == len(x) else 0
    outputs = weight[1]
    if groups == 1:
        contract(flow, node, x[place], weight[0])
    elif weight_size(args, 0) == groups:  # a group for every channel: they go together
        flow.unite(x[place], weight[0], node)
        flow.pin(weight[1], node, "gives several outputs for every group")
        outputs = None if weight[0] is None else np.repeat(weight[0], weight_size(args, 1))
    else:
        flow.unite(x[place], weight[0], node)
        if weight[0] is not None:
            flow.unite_rows(weight[0].reshape(groups, -1).T)
        outputs = None if weight[1] is None else np.tile(weight[1], groups)
    _kernel(flow, node, x[place + 1 :], weight[2:])
    _same(flow, node, outputs, args["bias"])
    return (*x[:place], outputs, *(None for _ in x[place + 1 :]))


def weight_size(args: dict[str, Any], dim: int) -> int:
    return int(size_of(args["weight"], dim))


def _same(flow: Labelling, node: fx.Node, axis: Axis, vector: object) -> None:
    """A bias goes with its unit."""
    if isinstance(vector, fx.Node):
        flow.unite(axis, flow.of(vector)[0], node)


def _kernel(flow: Labelling, node: fx.Node, *dims: Labels) -> None:
    for axis in (axis for group in dims for axis in group):
        flow.pin(axis, node, "slides along it")


def _follow_groups(flow: Labelling, node: fx.Node, inputs: Axis, outputs: Atoms) -> None:
    """Depthwise: an input channel goes with the outputs made of it alone, and `groups` shrinks."""
    flow.unite(inputs, flow.unite_rows(outputs), node)


def _same_in_every_group(flow: Labelling, node: fx.Node, inputs: Axis, weight: Axis, groups: int) -> None:
    """Groups stay equal: the same place of every group goes together."""
    flow.unite(inputs, None if weight is None else np.tile(weight, groups), node)


def attention(flow: Labelling, node: fx.Node) -> Value:
    args = arguments(node)
    query, key, value = (flow.of(args[name]) for name in ("query", "key", "value"))
    contract(flow, node, query[-1], key[-1])
    for axis in (query[-2], key[-2], value[-2]):
        flow.pin(axis, node, "weighs all positions against each other")
    parts = [(args["query"], query[:-2])]
    for name, axes in {"key": key[:-2], "value": value[:-2]}.items():
        # One head for all: deleting heads of the queries leaves it as it is.
        single = flow.reading.kinds and len(axes) > 0 and is_single(args[name], -3)
        if args["enable_gqa"] and not single:
            parts.append((args["query"], _shared(axes, args["query"])))
        else:
            parts.append((args[name], axes))
    batch = broadcast(flow, node, parts, drop=2)
    _mark(flow, batch, (query[-1], value[-1]))
    mask = args["attn_mask"]
    if isinstance(mask, fx.Node):
        for axis in flow.of(mask)[-2:]:
            flow.pin(axis, node, "masks positions")
        broadcast(flow, node, [(node, batch), (mask, flow.of(mask)[:-2])], drop=2)
    return (*batch, None, value[-1])


def _shared(axes: Labels, query: Any) -> Labels:
    """A head of keys or values stands opposite several heads of the queries."""
    if not axes or axes[-1] is None:
        return axes
    return (*axes[:-1], np.repeat(axes[-1], int(size_of(query, -3)) // len(axes[-1])))


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def embedding(flow: Labelling, node: fx.Node) -> Value:
    args = arguments(node)
    weight, indices = flow.of(args["weight"]), flow.of(args["indices"])
    flow.pin(weight[0], node, "looks its rows up by index")
    for axis in indices:
        flow.pin(axis, node, "is indexed along it")
    return (*(None for _ in indices), weight[1])


def einsum(flow: Labelling, node: fx.Node) -> Value:
    equation, factors = str(operands(node)[0]).replace(" ", ""), _items(operands(node)[1])
    terms, arrow, result = equation.partition("->")
    if "." in equation or not arrow:
        for operand in factors:
            for axis in flow.of(operand):
                flow.pin(axis, node, f"the equation {equation!r} is not understood")
        return tuple(None for _ in node.meta["val"].shape)
    found: dict[str, list[Axis]] = {}
    for term, operand in zip(terms.split(","), factors, strict=True):
        for dim, (letter, axis) in enumerate(zip(term, flow.of(operand), strict=True)):
            if not is_single(operand, dim):
                found.setdefault(letter, []).append(axis)
    merged: dict[str, Axis] = {}
    for letter, axes in found.items():
        merged[letter] = axes[0]
        for axis in axes[1:]:
            merged[letter] = flow.unite(merged[letter], axis, node)
    if len(factors) > 1 and _computed(factors):
        heads = {letter for letter in result if all(letter in term for term in terms.split(","))}
        _mark(
            flow,
            tuple(axis for letter, axis in merged.items() if letter in heads),
            tuple(axis for letter, axis in merged.items() if letter not in heads),
        )
    return tuple(merged.get(letter) for letter in result)


LAYER_RULES = {
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.mv.default: matmul,
    aten.addmm.default: addmm,
    aten.baddbmm.default: addmm,
    aten.conv1d.default: convolution,
    aten.conv1d.padding: convolution,
    aten.conv2d.default: convolution,
    aten.conv2d.padding: convolution,
    aten.conv3d.default: convolution,
    aten.conv3d.padding: convolution,
    aten.conv_transpose1d.default: transposed_convolution,
    aten.conv_transpose2d.input: transposed_convolution,
    aten.conv_transpose3d.input: transposed_convolution,
    aten.scaled_dot_product_attention.default: attention,
    aten.embedding.default: embedding,
    aten.einsum.default: einsum,
}
