"""What an equalization method is: scales for the places of a program, from its tensors and what its layers read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.equalization.pairs import Place
from fleetpress.compression.equalization.scaling import Equalization
from fleetpress.compression.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class EqualizeContext:
    """A program's stored tensors and places, and what is to follow: the scheme of every weight to be `quantized`.

    `statistics` are by weight; a weight that is not quantized is scaled but its errors do not count.
    """

    values: Mapping[str, Tensor]
    places: tuple[Place, ...]
    quantized: Mapping[str, QuantScheme]
    axes: Mapping[str, int] = field(default_factory=dict)  # where the output units of each weight are
    statistics: Mapping[str, WeightStatistics] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EqualizeMethod:
    """How scales are chosen; the paper it comes from, and one line on it."""

    name: str
    equalize: Callable[[EqualizeContext], Equalization]
    paper: str
    summary: str
    needs_inputs: bool = False
