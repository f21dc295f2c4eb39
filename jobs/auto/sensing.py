"""What could be done to every layer, what it would save, and by how much the loss would grow."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.joint_allocation import Deletion, Part
from fleetpress.compression.meter import Meter
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.quantization.file_sizes import coded_weight_bytes, deflated_weight_bytes
from fleetpress.compression.quantization.weight import predicted_bytes, to_rows
from fleetpress.compression.selection import Layer
from fleetpress.compression.sensitivity import expected_increase
from fleetpress.compression.unit_operations import Operations

from ..handover import Payload, record
from ..programs.materials import (
    calibration,
    first_arrays,
    trained_program,
)
from ..programs.quantizing import every_layer, group_of
from ..spec.schemes import scheme_of
from ..tasks import StepResult
from .choices import Sensed, Table
from .operation_sensing import sense_operations
from .original import effort_of
from .unit_sensing import sense_units, trusted

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
Zeros = tuple[tuple[float, tuple[int, ...]], ...]
# Shares of zeros and bits of what is left, for weights that are trained for both: one scale for a tensor is enough.
ZEROS: Zeros = (
    (0.0, (2, 3, 4, 6)),
    (0.5, (3, 4)),
    (0.7, (2, 3, 4)),
    (0.8, (2, 3)),
    (0.88, (2, 3)),
    (0.93, (2, 3)),
    (0.96, (2, 3)),
    (0.98, (3,)),
)
_PRICED_BY = "smallest_error"
_MOST_PROBED = 48  # layers; beyond, estimates of those that are known to be good have to do
_PROBED = {"num_bits": 2, "strategy": "channel"}  # where both are well above the noise of rounding


def sense(payload: Payload) -> StepResult:
    """Options of one group of layers, with bytes and expected increases of the loss; the first group also tells units.

    What a second-order estimate says is compared with a measurement at one setting; layers without statistics are
    measured at all of them. Where operations count, which neither bits nor zeros save, it is a share of the groups of
    units, and nothing else.
    """
    program = trained_program(payload)
    values = tensors(program)
    known = calibration(payload, "observe")
    assert known is not None, "the plan observes before it senses"
    index, count = payload["index"], payload["count"]
    meter = Meter(program, first_arrays(payload["data"]["train"]))
    if payload["options"].get("of") == "operations":
        return StepResult(result=sense_operations(program, values, known, meter, index=index, count=count))
    mine = group_of(every_layer(program), values, index, count)
    zeros = ZEROS if effort_of(payload, program).grows else ()
    found = {
        layer.name: [
            one for one in _options(layer, values, known, meter, zeros) if math.isfinite(one.increase)
        ]
        for layer in mine
    }
    result: dict[str, Any] = {
        "layers": {name: [dict(vars(item)) for item in options] for name, options in found.items()}
    }
    if index == 0:
        result |= sense_units(program, values, known, meter)
    return StepResult(result=result)


def table_of(payload: Payload) -> Table:
    """What all `sense` tasks found, in the bytes of the form that the recipe asks for."""
    is_archive = payload["recipe"].get("format") == "archive"
    layers: dict[str, list[Sensed]] = {}
    deletions: dict[str, list[Deletion]] = {}
    narrowings: dict[str, list[Deletion]] = {}
    parts: dict[str, tuple[Part, ...]] = {}
    idle: set[str] = set()
    operations: list[Operations] = []
    for digest in payload["stages"]["sense"]:
        result = record(payload, digest).result
        for name, options in result.get("layers", {}).items():
            found = [Sensed(**item) for item in options]
            layers[name] = [replace(one, bytes=one.coded_bytes) for one in found] if is_archive else found
        for mine, told in ((deletions, "deletions"), (narrowings, "narrowings")):
            mine |= {name: [Deletion(**one) for one in some] for name, some in result.get(told, {}).items()}
        idle.update(result.get("idle", ()))
        parts |= {name: _parts(some) for name, some in result.get("parts", {}).items()}
        operations += [
            Operations(macs=one["macs"], parts=_parts(one["parts"])) for one in result.get("operations", ())
        ]
    return Table(
        layers=layers,
        deletions=deletions,
        parts=parts,
        idle=frozenset(idle),
        narrowings=narrowings,
        operations=tuple(operations),
    )


def _parts(told: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    return tuple(
        Part(weight=one["weight"], axes=tuple((group, share) for group, share in one["axes"])) for one in told
    )


def _options(
    layer: Layer,
    values: Mapping[str, Tensor],
    known: CalibrationStatistics,
    meter: Meter,
    growing: Zeros,
) -> Iterator[Sensed]:
    owners = aliases(values)
    names = list(dict.fromkeys(owners.get(name, name) for name in layer.weights))
    whole = sum(values[name].nbytes for name in names)
    yield Sensed(layer=layer.name, settings=None, bytes=whole, coded_bytes=whole, increase=0.0)
    seen = [known.weights.get(name) for name in names]
    is_estimated = all(one is not None and one.output_squares is not None for one in seen)
    plain = {name: values[name] for name in layer.weights}

    def increase(weights: Mapping[str, Tensor]) -> float:
        return _estimate(layer, plain, weights, known, owners) if is_estimated else meter.increase(weights)

    factor = 1.0
    if is_estimated and len(known.weights) <= _MOST_PROBED:
        made = quantize_layer(layer, plain, scheme_of(_PROBED), QUANTIZERS[_PRICED_BY])
        weights = {name: weight.dequantize() for name, weight in made.items()}
        factor = trusted(meter.increase(weights), increase(weights))
    for settings in SETTINGS:
        yield _sensed(layer, plain, settings, lambda weights: factor * increase(weights))
    if not growing:
        return
    orders = {
        name: torch.argsort(value.detach().abs().flatten(), stable=True) for name, value in plain.items()
    }
    for zeros, every in growing:
        left = {name: _without_first(value.detach(), orders[name], zeros) for name, value in plain.items()}
        alone = factor * increase(left) if zeros else 0.0
        for bits in every:
            settings = {"num_bits": bits, "strategy": "tensor"}
            made_of = _sensed(layer, left, settings, lambda weights: factor * increase(weights))
            if not zeros:  # training uses all codes about alike: nothing is left for the file's own coding
                packed = _packed_bytes(layer, plain, settings)
                made_of = replace(made_of, bytes=packed, coded_bytes=packed)
            yield replace(made_of, is_trained=True, zeros=zeros, by_zeros=min(alone, made_of.increase))


def _sensed(
    layer: Layer,
    values: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    increase: Callable[[Mapping[str, Tensor]], float],
) -> Sensed:
    made = quantize_layer(layer, values, scheme_of(settings), QUANTIZERS[_PRICED_BY])
    return Sensed(
        layer=layer.name,
        settings=settings,
        bytes=sum(deflated_weight_bytes(weight) for weight in made.values()),
        coded_bytes=sum(coded_weight_bytes(weight) for weight in made.values()),
        increase=increase({name: weight.dequantize() for name, weight in made.items()}),
    )


def _packed_bytes(layer: Layer, values: Mapping[str, Tensor], settings: Mapping[str, Any]) -> int:
    """Bytes of codes and scales of the layer's weights, packed."""
    return sum(
        predicted_bytes(tuple(value.shape), layer.axis, scheme_of(settings), value.dtype)
        for value in values.values()
    )


def _without_first(weight: Tensor, order: Tensor, share: float) -> Tensor:
    """The weight with zeros for this share of its entries, the first ones in this order."""
    count = int(share * weight.numel())
    return weight.flatten().index_fill(0, order[:count], 0).view(weight.shape) if count else weight


def _estimate(
    layer: Layer,
    values: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    known: CalibrationStatistics,
    owners: Mapping[str, str],
) -> float:
    total = 0.0
    for name, weight in weights.items():
        change = to_rows(weight - values[name].detach(), layer.axis)
        total += expected_increase(change, known.weights[owners.get(name, name)], known.samples)
    return total
