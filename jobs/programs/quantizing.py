"""Layers to quantize: which, in which groups, and their codes to and from the store."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import CalibrationStatistics, WeightStatistics
from fleetpress.compression.errors import TargetError
from fleetpress.compression.layers import KINDS, layers
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.quantization import (
    QUANTIZERS,
    QuantizedWeight,
    QuantizeMethod,
    method_for,
    quantize_layer,
    quantize_weight,
)
from fleetpress.compression.quantization.aware import TrainedScales, with_scales
from fleetpress.compression.quantization.integer_layers import IntegerLayers
from fleetpress.compression.quantization.sparse_weight import SparseWeight, sparse_form, zeros_kept
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.selection import Layer, select

from ..handover import Payload, record
from ..spec.recipe import zeroes_weights
from ..spec.schemes import options_of, scheme_of
from ..tasks import StepResult
from .biases import CORRECTED, Biases
from .materials import store_tensors, stored_tensors
from .trained_scales import trained_scales

# Embeddings are looked up, not multiplied, and suffer most: they are quantized only when they are named as targets.
DEFAULT_KINDS = tuple(kind for kind in KINDS if kind != "Embedding")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Layers that a recipe quantizes, those it would but must not (name -> reason), and `ignore`s without effect."""

    layers: tuple[Layer, ...]
    skipped: Mapping[str, str]
    unused_ignores: tuple[str, ...]


def choose(program: ExportedProgram, options: Mapping[str, Any], *, step: str = "quantize") -> Choice:
    """The layers of a program that the step's `targets` and `ignore` choose; a tied weight only if all its users are.

    Raises TargetError when nothing is left, or a target matches nothing or no layer that can be quantized, or `layers`
    names one that the program has not.
    """
    known = layers(program)
    select(known, options.get("layers", {}), (), kinds=DEFAULT_KINDS)
    selection = select(known, options.get("targets", ()), options.get("ignore", ()), kinds=DEFAULT_KINDS)
    owners = aliases(tensors(program))
    chosen = {(layer.name, layer.kind) for layer in selection.layers}
    kept = {
        owners.get(weight, weight): layer
        for layer in known
        for weight in layer.weights
        if (layer.name, layer.kind) not in chosen
    }
    skipped: dict[str, str] = {}
    taken: list[Layer] = []
    for layer in selection.layers:
        tied = next(
            (
                kept[owners.get(weight, weight)]
                for weight in layer.weights
                if owners.get(weight, weight) in kept
            ),
            None,
        )
        if tied is None:
            taken.append(layer)
        else:
            skipped[layer.name] = f"its weight is also that of {tied.name} ({tied.kind}), which is kept"
    if not taken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise TargetError(
            f"{step} reaches no layer ({reasons or 'nothing is left after ignore'}); widen its targets"
        )
    return Choice(layers=tuple(taken), skipped=skipped, unused_ignores=selection.unused_ignores)


def every_layer(program: ExportedProgram) -> tuple[Layer, ...]:
    """All layers that can be quantized, embeddings too: they may be most of a model. Raises TargetError for none."""
    kinds = sorted({layer.kind for layer in layers(program)})
    if not kinds:
        raise TargetError(
            "the program has no layer that can be quantized or pruned; take it out of the fleet"
        )
    return choose(program, {"targets": kinds}).layers


def group_of(
    chosen: Sequence[Layer], values: Mapping[str, Tensor], index: int, count: int
) -> tuple[Layer, ...]:
    """The `index`-th of `count` runs of layers of about equal bytes; every layer is in exactly one."""
    sizes = [sum(values[weight].nbytes for weight in layer.weights) for layer in chosen]
    total, before = max(1, sum(sizes)), 0
    group = []
    for layer, size in zip(chosen, sizes, strict=True):
        if before * count // total == index:
            group.append(layer)
        before += size
    return tuple(group)


def schemes_of(
    program: ExportedProgram, chosen: Sequence[Layer], options: Mapping[str, Any]
) -> tuple[dict[str, QuantScheme], dict[str, str]]:
    """Each layer's scheme by its name, and why those that should run on integer kernels do not.

    The latter keep their weights' bits and read floats.
    """
    schemes = {layer.name: scheme_of(options_of(options, layer.name)) for layer in chosen}
    if not any(scheme.activation_bits for scheme in schemes.values()):
        return schemes, {}
    known = IntegerLayers(program)
    reasons = {
        layer.name: reason
        for layer in chosen
        if schemes[layer.name].activation_bits
        for reason in [known.reason_against(layer)]
        if reason
    }
    return schemes | {name: replace(schemes[name], activation_bits=None) for name in reasons}, reasons


def quantize_group(
    payload: Payload, program: ExportedProgram, observed: CalibrationStatistics | None
) -> StepResult:
    """Quantize the layers of one group; store codes, scales, zero points, codebooks, and record how to read them.

    `observed` is what the layers of the `program` read, where the recipe asks for it.
    """
    options = payload["options"]
    choice = choose(program, options)
    values = tensors(program)
    statistics = {} if observed is None else observed.weights
    stored: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    biases = Biases(program) if options.get("bias_correction") else None
    done: set[str] = set()
    owners = aliases(values)
    trained = trained_scales(payload)
    trained |= {name: trained[owner] for name, owner in owners.items() if owner in trained}
    zeroes = zeroes_weights(payload["recipe"])
    schemes, on_floats = schemes_of(program, choice.layers, options)
    for layer in group_of(choice.layers, values, payload["index"], payload["count"]):
        known = {
            name: statistics[owners.get(name, name)]
            for name in layer.weights
            if owners.get(name, name) in statistics
        }
        scheme, method = schemes[layer.name], QUANTIZERS[options_of(options, layer.name)["method"]]
        for name, rounded in _quantized(layer, values, scheme, method, known, trained=trained).items():
            if owners.get(name, name) in done:
                continue
            done.add(owners.get(name, name))
            quantized = zeros_kept(rounded, values[name]) if zeroes else rounded
            if zeroes and scheme.activation_bits is None:
                quantized = sparse_form(quantized)
            stored |= {f"{name}/{part}": value for part, value in parts_of(quantized).items()}
            used = "trained" if name in trained else method_for(method, known.get(name)).name
            weights[name] = {
                "layer": layer.name,
                "kind": layer.kind,
                "method": used,
                **description(quantized, values[name]),
                **({"reads_floats": on_floats[layer.name]} if layer.name in on_floats else {}),
            }
            if biases is not None:
                biases.correct(layer, name, quantized, known.get(name))
    result = {
        "weights": weights,
        "skipped": dict(choice.skipped),
        "unused_ignores": list(choice.unused_ignores),
    }
    if biases is not None:
        stored |= {CORRECTED + name: value for name, value in biases.corrected.items()}
        result["uncorrected"] = biases.uncorrected
    return StepResult(result=result, outputs=(store_tensors(payload, stored),))


def _quantized(
    layer: Layer,
    values: Mapping[str, Tensor],
    scheme: QuantScheme,
    method: QuantizeMethod,
    statistics: Mapping[str, WeightStatistics],
    *,
    trained: Mapping[str, TrainedScales],
) -> dict[str, QuantizedWeight]:
    """By the method, or with the scales that were trained with the weights: those give the codes training saw."""
    if any(name in trained for name in layer.weights):
        return {
            name: quantize_weight(
                name,
                values[name],
                layer.axis,
                scheme,
                with_scales(trained[name]),
                statistics=statistics.get(name),
            )
            for name in layer.weights
        }
    return quantize_layer(layer, values, scheme, method, statistics)


def quantized_weights(payload: Payload) -> dict[str, QuantizedWeight]:
    """Every quantized weight of the model, from the records of its quantize tasks."""
    found: dict[str, QuantizedWeight] = {}
    for digest in payload["stages"].get("quantize", ()):
        parts = stored_tensors(payload, digest)
        for name, facts in record(payload, digest).result["weights"].items():
            own = {
                part.removeprefix(f"{name}/"): value
                for part, value in parts.items()
                if part.startswith(f"{name}/")
            }
            found[name] = weight_of(own, facts)
    return found


def weight_of(parts: Mapping[str, Tensor], facts: Mapping[str, Any]) -> QuantizedWeight:
    """A quantized weight from its tensors (`parts_of`) and what is recorded of it: scheme, shape, axis."""
    dtype = facts.get("weight_dtype")
    form = SparseWeight if facts.get("sparse") else QuantizedWeight
    return form(
        codes=parts["codes"],
        scale=parts["scale"],
        zero_point=parts.get("zero_point"),
        scheme=QuantScheme(**facts["scheme"]),
        shape=tuple(facts["shape"]),
        axis=facts["axis"],
        codebook=parts.get("codebook"),
        weight_dtype=None if dtype is None else getattr(torch, dtype),
        input_scale=facts.get("input_scale"),
        input_zero_point=facts.get("input_zero_point"),
    )


def parts_of(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that a quantized weight is stored as."""
    parts = {
        "codes": quantized.codes,
        "scale": quantized.scale,
        "zero_point": quantized.zero_point,
        "codebook": quantized.codebook,
    }
    return {name: value for name, value in parts.items() if value is not None}


def quantized_layers(payload: Payload) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Metrics of quantized weights by name, layers that were skipped with the reason, and `ignore`s without effect."""
    weights: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    unused: list[str] = []
    for digest in payload["stages"].get("quantize", ()):
        result = record(payload, digest).result
        weights |= result["weights"]
        skipped |= result["skipped"]
        unused = result["unused_ignores"]
    return weights, skipped, unused


def meaning_of(quantized: QuantizedWeight) -> dict[str, Any]:
    """What `weight_of` needs to know beside the tensors, the shape and the axis."""
    dtype = quantized.weight_dtype
    return {
        "scheme": {
            key: value
            for key, value in vars(quantized.scheme).items()
            if key not in ("codebook", "activation_bits") or value is not None
        },
        **{
            key: getattr(quantized, key)
            for key in ("input_scale", "input_zero_point")
            if getattr(quantized, key) is not None
        },
        **({} if dtype is None else {"weight_dtype": str(dtype).removeprefix("torch.")}),
    }


def description(quantized: QuantizedWeight, weight: Tensor) -> dict[str, Any]:
    return {
        **({"sparse": True} if isinstance(quantized, SparseWeight) else {}),
        **meaning_of(quantized),
        "shape": list(quantized.shape),
        "axis": quantized.axis,
        "group_size": quantized.group_size,
        "bytes_before": weight.nbytes,
        "bytes_after": quantized.stored_bytes(),
        "sqnr_db": _finite(quantized.sqnr_db(weight)),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: a weight that quantization did not change has no noise to measure."""
    return round(value, 4) if math.isfinite(value) else None
