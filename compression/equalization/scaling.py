"""Scales of places, put into a program's tensors and into what is known of its layers' inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fleetpress.compression.calibration import CalibrationStatistics, InputStatistics, WeightStatistics
from fleetpress.compression.equalization.pairs import Place, Reader

_ROWS = 256  # of a Gram matrix that are divided at once


@dataclass(frozen=True, kw_only=True)
class Equalization:
    """`tensors` to put in place of the program's of the same names; its outputs stay what they were.

    `inputs` and `outputs` say by weight what its inputs (per column of the weight) and its outputs (per unit) are
    divided by now; weights that are not named are as before. All float64.
    """

    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def rescaled(self, statistics: CalibrationStatistics) -> CalibrationStatistics:
        """The `statistics` of the program as it was, as those of the program as it is.

        Exact, except for `range`, which becomes the widest that is possible.
        """
        done: dict[tuple[int, str | None], InputStatistics] = {}
        found = {}
        for name, known in statistics.weights.items():
            scale = self.inputs.get(name)
            key = id(known.inputs), None if scale is None else str(scale.tolist())
            if key not in done:
                done[key] = known.inputs if scale is None else divided(known.inputs, scale)
            squares, outer = known.output_squares, self.outputs.get(name)
            if squares is not None and outer is not None:
                squares = squares * outer.square()  # the gradient grows as the output shrinks
            found[name] = WeightStatistics(inputs=done[key], output_squares=squares)
        return replace(statistics, weights=found)


def divided(inputs: InputStatistics, scale: Tensor) -> InputStatistics:
    """Those of inputs [columns] that are divided by `scale` [columns], of a weight without groups."""
    size = inputs.gram.shape[-1]
    padded = torch.ones(inputs.gram.shape[1] * size, dtype=torch.float64)
    padded[: inputs.columns] = scale
    gram = torch.empty_like(inputs.gram)
    for made, known, mine in zip(gram[0], inputs.gram[0], padded.view(-1, size), strict=True):
        for rows in torch.split(
            torch.arange(size), _ROWS
        ):  # in doubles all of long rows would take gigabytes
            made[rows] = (known[rows].double() / mine[rows].unsqueeze(1) / mine).float()
    widest = torch.stack([1 / scale.min(), 1 / scale.max()]).float()
    low, high = (torch.outer(inputs.range, widest)).aminmax(dim=1)
    return InputStatistics(
        rows=inputs.rows,
        total=inputs.total / scale,
        squares=inputs.squares / scale.square(),
        gram=gram,
        range=torch.stack([low[0], high[1]]),
        importance=inputs.importance,
    )


def of_columns(scale: Tensor, reader: Reader, weight: Tensor) -> Tensor:
    """The scale [channels] as one of the entries [columns] of a unit's row of the reader's weight."""
    by_channel = scale.repeat_interleave(reader.repeat)
    return by_channel.repeat_interleave(weight.numel() // weight.shape[1 - reader.axis] // len(by_channel))


def along(scale: Tensor, value: Tensor, axis: int) -> Tensor:
    """The scale shaped so that it goes along one dim of `value`."""
    shape = [1] * value.dim()
    shape[axis] = -1
    return scale.view(shape)


class Scaled:
    """A program's tensors under one place after another. Values are kept in float64, so nothing adds up."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self._exact: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def value(self, name: str) -> Tensor:
        """The tensor as it is now, in float64."""
        return self._exact.get(name, self._values[name].detach().double())

    def apply(self, place: Place, scale: Tensor) -> None:
        """Divide the place's producers by `scale` [channels], and multiply its readers with it."""
        for name, axis in place.producers:
            value = self.value(name)
            self._exact[name] = value / along(scale, value, axis)
        if place.kind == "layer":
            self._note(self._outputs, place.producers[0][0], scale)
        for reader in place.readers:
            value = self.value(reader.weight)
            self._exact[reader.weight] = value * along(
                scale.repeat_interleave(reader.repeat), value, reader.axis
            )
            self._note(self._inputs, reader.weight, of_columns(scale, reader, value))

    def result(self) -> Equalization:
        """All that changed."""
        return Equalization(
            tensors={name: value.to(self._values[name].dtype) for name, value in self._exact.items()},
            inputs=dict(self._inputs),
            outputs=dict(self._outputs),
        )

    @staticmethod
    def _note(where: dict[str, Tensor], name: str, scale: Tensor) -> None:
        where[name] = where[name] * scale if name in where else scale
