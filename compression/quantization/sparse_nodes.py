"""The operators that spread the stored part of a sparse weight over its places, and put zeros between.

Bit i of the mask says whether weight i is stored. The sum of the bits up to i is its place among those that are; place
0 is a zero in front of them, which all others take.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
Call = Callable[..., fx.Node]
"""Adds an operator with its arguments to the graph."""


def spread(call: Call, bits: fx.Node, stored: fx.Node, zero: Any) -> fx.Node:
    """A node with one entry a bit, flat: the next of `stored` [k] where the bit is set, `zero` where it is not.

    `bits` is a node of n uint8, 0 or 1, k of them 1, flat.
    """
    places = call(aten.cumsum.default, bits, 0, dtype=torch.int32)
    places = call(aten.mul.Tensor, places, bits)
    stored = call(aten.constant_pad_nd.default, stored, [1, 0], zero)
    return call(aten.index_select.default, stored, 0, places)


def zeroed(call: Call, bits: fx.Node, value: fx.Node, shape: list[int]) -> fx.Node:
    """`value`, of that shape, with zeros where the bit is not set: a zero point gives 0 a meaning."""
    kept = call(aten.to.dtype, call(aten.reshape.default, bits, shape), torch.bool)
    return call(aten.where.ScalarOther, kept, value, 0)
