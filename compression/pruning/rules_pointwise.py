"""How labels pass through operators that work entry by entry, channel by channel, or along some dims."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fleetpress.compression.arguments import arguments, is_single, operands
from fleetpress.compression.pruning.labels import Axis, Labelling, Labels, Rule, Value

aten = torch.ops.aten

STATISTICS = "its statistics mix the units"


def broadcast(
    flow: Labelling, node: fx.Node, parts: Sequence[tuple[Any, Labels]], *, drop: int = 0
) -> Labels:
    """Unite dims that stand opposite each other, aligned at the right; a dim of size 1 goes with anything.

    A part is the node whose sizes count, without its `drop` last dims, and the labels of its dims.
    """
    rank = max(len(labels) for _, labels in parts)
    merged: list[Axis] = [None] * rank
    met = [False] * rank
    for item, labels in parts:
        for place in range(1, len(labels) + 1):
            if is_single(item, -place - drop):
                continue
            axis = labels[-place]
            merged[-place] = flow.unite(merged[-place], axis, node) if met[-place] else axis
            met[-place] = True
    return tuple(merged)


def elementwise(flow: Labelling, node: fx.Node) -> Value:
    """Entry by entry: what stands opposite each other goes together (biases, gates, residual sums, layer scales)."""
    parts = [
        (item, flow.of(item))
        for item in node.all_input_nodes
        if isinstance(item.meta.get("val"), torch.Tensor)
    ]
    return each_result(node, broadcast(flow, node, parts)) if parts else None


def per_channel(flow: Labelling, node: fx.Node) -> Value:
    """Batch and instance norm, prelu: a channel goes with its entry in every vector."""
    first, *vectors = [
        item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)
    ]
    x = flow.of(first)
    channel = 1 if len(x) > 1 else 0
    for item in vectors:
        if not is_single(item, 0):
            flow.unite(x[channel], flow.of(item)[0], node)
    for axis in (*x[:channel], *x[channel + 1 :]):
        flow.pin(axis, node, STATISTICS)
    labels = tuple(axis if dim == channel else None for dim, axis in enumerate(x))
    return each_result(node, labels)


def activation_per_channel(flow: Labelling, node: fx.Node) -> Value:
    """prelu: one slope for all, or one for every channel."""
    x, slope = flow.of(operands(node)[0]), flow.of(operands(node)[1])
    if isinstance(operands(node)[1], fx.Node) and not is_single(operands(node)[1], 0):
        flow.unite(x[1 if len(x) > 1 else 0], slope[0], node)
    return x


def each_result(node: fx.Node, labels: Labels) -> Value:
    """The same labels for every result of that shape; saved statistics and the like have none."""
    results = node.meta["val"]
    if isinstance(results, torch.Tensor):
        return labels
    same = results[0].dim()
    return [labels if item.dim() == same else tuple(None for _ in item.shape) for item in results]


def along_dim(flow: Labelling, node: fx.Node) -> Value:
    """softmax, cumsum, sort, roll: what happens along the dim depends on all of it."""
    args = arguments(node)
    x = flow.of(operands(node)[0])
    given = args.get("dim", args.get("dims"))
    for dim in reduced_dims(given, len(x)):
        flow.pin(x[dim], node, "mixes the units along their dim")
    return each_result(node, x)


def reduction(flow: Labelling, node: fx.Node) -> Value:
    """mean, amax, norm: over units the result depends on their number or on each of them."""
    return _reduced(flow, node, exact=False)


def mean(flow: Labelling, node: fx.Node) -> Value:
    """A mean over units keeps its divisor, so that a deleted unit counts as zero; where that is asked for."""
    return _reduced(flow, node, exact=flow.reading.normalized)


def sum_(flow: Labelling, node: fx.Node) -> Value:
    """A sum leaves a deleted unit out, as if it were zero."""
    return _reduced(flow, node, exact=True)


def _reduced(flow: Labelling, node: fx.Node, *, exact: bool) -> Value:
    args = arguments(node)
    x = flow.of(operands(node)[0])
    dims = reduced_dims(args.get("dim"), len(x))
    for dim in dims:
        if not exact:
            flow.pin(x[dim], node, STATISTICS)
        elif flow.reading.normalized:
            flow.mark(x[dim], "normalized")
    if args.get("keepdim"):
        labels = tuple(None if dim in dims else axis for dim, axis in enumerate(x))
    else:
        labels = tuple(axis for dim, axis in enumerate(x) if dim not in dims)
    return each_result(node, labels)


def reduced_dims(given: Any, rank: int) -> tuple[int, ...]:
    """Dims that an operator works along, counted from the front; none given means all."""
    if given is None or given == []:
        return tuple(range(rank))
    dims = given if isinstance(given, (list, tuple)) else [given]
    return tuple(int(dim) % rank for dim in dims) if rank else ()


def glu(flow: Labelling, node: fx.Node) -> Value:
    """The first half of the dim gates with the second: both places of a unit go together."""
    x = flow.of(operands(node)[0])
    dim = int(arguments(node)["dim"]) % len(x)
    axis = x[dim]
    if axis is not None:
        axis = flow.unite_rows(axis.reshape(2, -1).T)
    return (*x[:dim], axis, *x[dim + 1 :])


def spatial(count: int) -> Rule:
    """Pooling, resizing, padding of the last `count` dims: every channel by itself."""

    def rule(flow: Labelling, node: fx.Node) -> Value:
        x = flow.of(operands(node)[0])
        for axis in x[len(x) - count :]:
            flow.pin(axis, node, "slides along it")
        labels = (*x[: len(x) - count], *(None for _ in range(count)))
        return each_result(node, labels)

    return rule


def pad(flow: Labelling, node: fx.Node) -> Value:
    """The padded dims get entries that belong to no unit."""
    x, amounts = flow.of(operands(node)[0]), list(operands(node)[1])
    labels = list(x)
    for place in range(len(amounts) // 2):
        if amounts[2 * place : 2 * place + 2] != [0, 0]:
            flow.pin(labels[-1 - place], node, "pads the units' dim")
            labels[-1 - place] = None
    return tuple(labels)


def pixel_shuffle(flow: Labelling, node: fx.Node) -> Value:
    x, factor = flow.of(operands(node)[0]), int(operands(node)[1])
    channels = None if x[-3] is None else flow.unite_rows(x[-3].reshape(-1, factor * factor))
    return (*x[:-3], channels, None, None)


def no_tensor(flow: Labelling, node: fx.Node) -> Value:
    """Sizes and checks."""
    return None


def assertion(flow: Labelling, node: fx.Node) -> Value:
    """A check of dtype, layout and device says nothing about sizes, unless it names them."""
    args = arguments(node)
    if not flow.reading.kinds or args["size"] is not None or args["stride"] is not None:
        for axis in flow.of(operands(node)[0]):
            flow.pin(axis, node, f"the operator {node.target} is not understood")
    return None


_ENTRY_BY_ENTRY = """
    abs abs_ add add_ addcmul addcdiv sub sub_ rsub mul mul_ div div_ true_divide neg neg_ pow pow_
    square sqrt sqrt_ rsqrt reciprocal exp exp_ expm1 log log1p log2 sin cos tan tanh tanh_ sinh cosh
    asin acos atan atan2 erf erfc sigmoid sigmoid_ logit relu relu_ relu6 relu6_ leaky_relu leaky_relu_
    elu elu_ celu celu_ selu selu_ gelu gelu_ silu silu_ mish mish_ softplus softsign hardtanh hardtanh_
    hardswish hardswish_ hardsigmoid hardsigmoid_ hardshrink softshrink log_sigmoid threshold threshold_
    clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip floor ceil round trunc sign sgn frac
    remainder fmod floor_divide maximum minimum fmax fmin where masked_fill masked_fill_ lerp eq ne lt le
    gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor
    __and__ __or__ isnan isinf isfinite nan_to_num zeros_like ones_like full_like empty_like rand_like
    randn_like dropout dropout_ native_dropout alpha_dropout feature_dropout feature_alpha_dropout
    bernoulli clone contiguous detach detach_ alias lift_fresh_copy lift_fresh to _to_copy type_as float
    copy copy_ fill fill_ zero_ view_as_real_copy rrelu
"""


def _overloads(names: str) -> list[Any]:
    packets = [getattr(aten, name) for name in names.split() if hasattr(aten, name)]
    return [
        getattr(packet, overload)
        for packet in packets
        for overload in packet.overloads()
        if overload != "out"
    ]


def _table(names: str, rule: Rule) -> dict[Any, Rule]:
    return dict.fromkeys(_overloads(names), rule)


POINTWISE_RULES: dict[Any, Rule] = {
    **_table(_ENTRY_BY_ENTRY, elementwise),
    **_table("batch_norm _native_batch_norm_legit_no_training instance_norm", per_channel),
    **_table("prelu _prelu_kernel", activation_per_channel),
    **_table(
        "softmax _softmax log_softmax _log_softmax softmin cumsum cumprod sort argsort roll logcumsumexp",
        along_dim,
    ),
    **_table(
        "amax amin max min argmax argmin var std var_mean std_mean prod logsumexp median norm", reduction
    ),
    **_table("mean", mean),
    **_table("sum", sum_),
    **_table("glu", glu),
    **_table("max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d", spatial(1)),
    **_table(
        "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices", spatial(2)
    ),
    **_table("_adaptive_avg_pool2d lp_pool2d", spatial(2)),
    **_table("max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d", spatial(3)),
    **_table("upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d", spatial(1)),
    **_table(
        "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d", spatial(2)
    ),
    **_table("upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d", spatial(3)),
    **_table(
        "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d", pad
    ),
    **_table("pixel_shuffle", pixel_shuffle),
    **_table("sym_size sym_numel sym_constrain_range_for_size _assert_async _assert_scalar", no_tensor),
    **_table("_assert_tensor_metadata", assertion),
}
