"""What the weights of LSTM, GRU and RNN layers read: the inputs of a sequence, and the hidden states it went through.

One operator runs several layers and directions over the whole sequence and shows the outputs of the last layer only;
so its layers are run one after the other here, each by the same operator.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_LSTM = torch.ops.aten.lstm.input


def read_together(parameters: int, num_layers: int, bidirectional: bool) -> Iterator[tuple[int, ...]]:
    """Places of weights, among so many parameters of a recurrent operator, that read the same rows.

    Layer by layer: the input weights of both directions, then the hidden weights of each. The projection of an LSTM
    reads states that no operator shows: it is left out.
    """
    directions = 1 + bidirectional
    each = parameters // (num_layers * directions)
    for first in range(0, parameters, directions * each):
        starts = range(first, first + directions * each, each)
        yield tuple(starts)
        yield from ((start + 1,) for start in starts)


def recurrent_inputs(
    op: Callable[..., Any],
    x: Tensor,
    state: Any,
    parameters: list[Tensor],
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> Iterator[Tensor]:
    """The rows [steps * batch, columns] that weights are multiplied with, in the order of `read_together`.

    The arguments are those of the recurrent operator `op` in eval mode: `x` [steps, batch, inputs] ([batch, steps,
    inputs] with `batch_first`), `state` the hidden states before the first step [layers * directions, batch, hidden],
    of an LSTM a list of them and the cells'.
    """
    directions = 1 + bidirectional
    each = len(parameters) // num_layers
    states = list(state) if op is _LSTM else [state]
    sequence = x.transpose(0, 1) if batch_first else x
    for layer in range(num_layers):
        yield sequence.flatten(0, 1)
        begin = [part[layer * directions : (layer + 1) * directions].contiguous() for part in states]
        mine = parameters[layer * each : (layer + 1) * each]
        given = begin if op is _LSTM else begin[0]
        outputs = op(sequence, given, mine, has_biases, 1, 0.0, False, bidirectional, False)[0]
        for direction, hidden in enumerate(outputs.chunk(directions, dim=-1)):
            start = begin[0][direction : direction + 1]
            yield torch.cat([hidden[1:], start] if direction else [start, hidden[:-1]]).flatten(0, 1)
        sequence = outputs
