"""What could be done to every layer, what it would save, and by how much the loss would grow."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import evenly
from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.evaluation import Runner, all_outputs
from fleetpress.compression.outputs import meaning
from fleetpress.compression.program import aliases, tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_layer
from fleetpress.compression.quantization.weight import to_rows
from fleetpress.compression.selection import Layer
from fleetpress.compression.sensitivity import divergence, expected_increase

from ..handover import Payload, record
from ..programs.materials import (
    calibration,
    shard_arrays,
    trained_program,
)
from ..programs.quantizing import every_layer, group_of
from ..spec.schemes import scheme_of
from ..tasks import StepResult
from .candidates import Sensed, Table

# Bits and groups that are worth a choice; fewer bits need smaller groups.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_bits": 8, "strategy": "channel"},
    {"num_bits": 6, "strategy": "channel"},
    {"num_bits": 5, "strategy": "channel"},
    {"num_bits": 4, "strategy": "channel"},
    {"num_bits": 4, "group_size": 64},
    {"num_bits": 3, "strategy": "channel"},
    {"num_bits": 3, "group_size": 64},
    {"num_bits": 2, "strategy": "channel"},
    {"num_bits": 2, "group_size": 64},
)
_PRICED_BY = "smallest_error"
_SAMPLES = 64
_MOST_PROBED = 48  # layers; beyond, estimates of those that are known to be good have to do
_TRUSTED = 8.0  # an estimate is corrected by no more than this factor


def sense(payload: Payload) -> StepResult:
    """Options of one group of layers, with bytes and expected increases of the loss.

    What a second-order estimate says is compared with a measurement at one setting; layers without statistics are
    measured at all of them.
    """
    program = trained_program(payload)
    values = tensors(program)
    known = calibration(payload, "observe")
    assert known is not None, "the plan observes before it senses"
    mine = group_of(every_layer(program), values, payload["index"], payload["count"])
    meter = _Meter(program, payload)
    found = {layer.name: list(_options(layer, values, known, meter)) for layer in mine}
    return StepResult(
        result={"layers": {name: [dict(vars(item)) for item in options] for name, options in found.items()}}
    )


def table_of(payload: Payload) -> Table:
    """What all `sense` tasks found."""
    found: dict[str, list[Sensed]] = {}
    for digest in payload["stages"]["sense"]:
        for name, options in record(payload, digest).result["layers"].items():
            found[name] = [Sensed(**item) for item in options]
    return Table(layers=found)


class _Meter:
    """Measures by how much the outputs of a program diverge when some of its tensors change."""

    def __init__(self, program: ExportedProgram, payload: Payload) -> None:
        self._program = program
        self._samples = evenly(shard_arrays(payload["data"]["train"][0]), _SAMPLES)
        self._before: Tensor | None = None

    def increase(self, changed: Mapping[str, Tensor]) -> float:
        """Mean divergence of a sample's outputs, in the unit of the expected increase."""
        if self._before is None:
            self._before = self._outputs(self._program)
        after = self._outputs(with_tensors(self._program, changed))
        return divergence(self._before, after, meaning(self._program))

    def _outputs(self, program: ExportedProgram) -> Tensor:
        return all_outputs(Runner(program), self._samples)


def _options(
    layer: Layer,
    values: Mapping[str, Tensor],
    known: CalibrationStatistics,
    meter: _Meter,
) -> Iterator[Sensed]:
    owners = aliases(values)
    names = [owners.get(name, name) for name in layer.weights]
    yield Sensed(
        layer=layer.name, settings=None, bytes=sum(values[name].nbytes for name in set(names)), increase=0.0
    )
    estimated = all(name in known.weights for name in names)
    made = [
        quantize_layer(layer, values, scheme_of(settings), QUANTIZERS[_PRICED_BY]) for settings in SETTINGS
    ]
    factor = 1.0
    if estimated:
        factor = _correction(layer, values, known, meter, made)
    for settings, weights in zip(SETTINGS, made, strict=True):
        increase = (
            factor * _estimate(layer, values, known, weights)
            if estimated
            else meter.increase({name: weight.dequantize() for name, weight in weights.items()})
        )
        yield Sensed(
            layer=layer.name,
            settings=settings,
            bytes=sum(weight.stored_bytes() for weight in weights.values()),
            increase=increase,
        )


def _estimate(
    layer: Layer,
    values: Mapping[str, Tensor],
    known: CalibrationStatistics,
    weights: Mapping[str, QuantizedWeight],
) -> float:
    owners = aliases(values)
    total = 0.0
    for name, weight in weights.items():
        change = to_rows(weight.dequantize() - values[name].detach(), layer.axis)
        total += expected_increase(change, known.weights[owners.get(name, name)], known.samples)
    return total


def _correction(
    layer: Layer,
    values: Mapping[str, Tensor],
    known: CalibrationStatistics,
    meter: _Meter,
    made: list[dict[str, QuantizedWeight]],
) -> float:
    """Measured over expected at few bits, where both are well above the noise of rounding."""
    if len(known.weights) > _MOST_PROBED:
        return 1.0
    weights = made[-2]
    expected = _estimate(layer, values, known, weights)
    if expected <= 0:
        return 1.0
    measured = meter.increase({name: weight.dequantize() for name, weight in weights.items()})
    return min(_TRUSTED, max(1 / _TRUSTED, measured / expected))
