"""About how much memory a value takes that a process remembers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.program import aliases, tensors

_GRAPH_BYTES = 1 << 20  # of a program's graph and modules
_SMALL_BYTES = 64


def held_bytes(value: Any) -> int:
    """Tensors by their size, a program with its graph, everything else by the number of its parts."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, ExportedProgram):
        stored = tensors(value)
        tied = aliases(stored)
        return _GRAPH_BYTES + sum(one.nbytes for name, one in stored.items() if name not in tied)
    if isinstance(value, CalibrationStatistics):
        inputs = {id(item.inputs): vars(item.inputs) for item in value.weights.values()}
        squares = {name: item.output_squares for name, item in value.weights.items()}
        return held_bytes([*inputs.values(), squares])
    if isinstance(value, Mapping):
        return _SMALL_BYTES + sum(_SMALL_BYTES + held_bytes(one) for one in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _SMALL_BYTES + sum(held_bytes(one) for one in value)
    return _SMALL_BYTES
