"""How labels pass through recurrent layers."""

from typing import Any

import numpy as np
import torch
from torch import fx

from fleetpress.compression.arguments import arguments, operands
from fleetpress.compression.pruning.labels import Atoms, Labelling, Labels, Value

aten = torch.ops.aten

GATES: dict[Any, int] = {
    aten.lstm.input: 4,
    aten.gru.input: 3,
    aten.rnn_tanh.input: 1,
    aten.rnn_relu.input: 1,
}


def recurrent(flow: Labelling, node: fx.Node) -> Value:
    """The features that go in may be deleted; hidden units feed themselves, and go when they are asked for."""
    x, states, params = operands(node)[:3]
    features = flow.of(x)
    args = arguments(node)
    directions = 2 if args["bidirectional"] else 1
    step = 4 if args["has_biases"] else 2
    for entry in params[: step * directions : step]:
        flow.unite(features[-1], flow.of(entry)[1], node)
    for axis in features[:-1]:
        flow.pin(axis, node, "recurrent: it runs along the sequence")
    plain = len(params) == step * directions * int(args["num_layers"])  # no projections of the hidden state
    hidden = flow.of(params[1])[1] if flow.reading.recurrent and plain else None
    if hidden is not None:
        return _hidden_units(
            flow,
            node,
            hidden,
            _items(states),
            [tuple(params[i : i + step]) for i in range(0, len(params), step)],
        )
    entries = params[: step * directions : step]
    for item in [*_items(states), *params]:
        for dim, axis in enumerate(flow.of(item)):
            if not (item in entries and dim == 1):
                flow.pin(axis, node, "recurrent: its hidden units feed themselves")
    return [tuple(None for _ in value.shape) for value in node.meta["val"]]


def _hidden_units(
    flow: Labelling, node: fx.Node, hidden: Atoms, states: list[Any], cells: list[tuple[Any, ...]]
) -> Value:
    """A hidden unit is a row of every gate and a column of the recurrent weight.

    All layers and directions share one tensor of states, so they stay equally wide: the same unit of each goes. A unit
    that is held at zero where it is read changes nothing else, whatever its own gates do.
    """
    flow.mark(hidden, "recurrent")
    gates = np.tile(hidden, GATES[node.target])
    directions = 2 if arguments(node)["bidirectional"] else 1
    both = np.tile(hidden, directions)
    for place, (entry, recurrence, *biases) in enumerate(cells):
        flow.unite(flow.of(entry)[0], gates, node)
        flow.unite(flow.of(recurrence)[0], gates, node)
        flow.unite(flow.of(recurrence)[1], hidden, node)
        if place >= directions:
            flow.unite(flow.of(entry)[1], both, node)
        for bias in biases:
            flow.unite(flow.of(bias)[0], gates, node)
    for state in states:
        labels = flow.of(state)
        flow.unite(labels[-1], hidden, node)
        for axis in labels[:-1]:
            flow.pin(axis, node, "recurrent: a state for every layer and sequence")
    first, *rest = node.meta["val"]
    return [_last(first, both), *(_last(value, hidden) for value in rest)]


def _last(value: torch.Tensor, axis: Atoms) -> Labels:
    return (*(None for _ in value.shape[:-1]), axis)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


RECURRENT_RULES = dict.fromkeys(GATES, recurrent)
