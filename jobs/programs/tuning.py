"""What a fine-tuning keeps to besides its data: zeros, zeros that grow, and the codes that weights will become."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.export import ExportedProgram

from fleetpress.compression.gradual import GradualOptions
from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors, trainable
from fleetpress.compression.quantization import QUANTIZERS, method_for
from fleetpress.compression.quantization.aware import AwareWeight
from fleetpress.compression.selection import Layer, check_names, select

from ..handover import Payload
from ..spec.layer_shares import shares_of
from ..spec.recipe import zeroes_weights
from ..spec.schemes import options_of, scheme_of
from .materials import calibration
from .quantizing import DEFAULT_KINDS, choose
from .zeroing import trained_masks


def constraints(payload: Payload, program: ExportedProgram) -> dict[str, Any]:
    """Arguments of `training.train` for the fine-tuning of the pruned `program`: `masks`, `gradual`, `quantized`.

    Raises TargetError for targets that match nothing.
    """
    found: dict[str, Any] = {"masks": trained_masks(payload, program)}
    if "prune" in payload:
        found["gradual"] = _gradual(payload["prune"], program)
    if "quantize" in payload:
        found["quantized"] = _quantized(payload, program)
    return found


def _gradual(options: Mapping[str, Any], program: ExportedProgram) -> GradualOptions:
    known, own = layers(program), shares_of(options)
    check_names(known, own)
    chosen = select(known, options.get("targets", ()), options.get("ignore", ()), kinds=DEFAULT_KINDS).layers
    if not options.get("targets"):  # a layer that is named is meant, whatever its kind
        chosen += tuple(layer for layer in known if layer.name in own and layer not in chosen)
    weights = _trained(program, chosen)
    return GradualOptions(
        weights=tuple(weights),
        sparsity=options.get("sparsity"),
        scope=options["scope"],
        ramp=options["ramp"],
        interval=options["interval"],
        shares={name: own[layer.name] for name, layer in weights.items() if layer.name in own},
    )


def _quantized(payload: Payload, program: ExportedProgram) -> dict[str, AwareWeight]:
    options, observed = payload["quantize"], calibration(payload)
    statistics = {} if observed is None else observed.weights
    found = {}
    for name, layer in _trained(program, choose(program, options).layers).items():
        own = options_of(options, layer.name)
        method = QUANTIZERS[own["method"]]
        known = statistics.get(name) if method.needs_inputs else None
        found[name] = AwareWeight(
            axis=layer.axis,
            scheme=scheme_of(own),
            method=method_for(method, known),
            statistics=known,
            # Where weights are zeroed, `quantize` gives every codebook a zero.
            keeps_zero=zeroes_weights(payload["recipe"]),
        )
    return found


def _trained(program: ExportedProgram, chosen: Iterable[Layer]) -> dict[str, Layer]:
    """The layers by the weights of theirs that training changes; a tied weight once, by its owner's name."""
    owners, known = aliases(tensors(program)), set(trainable(program))
    names = {owners.get(name, name): layer for layer in chosen for name in layer.weights}
    return {name: layer for name, layer in names.items() if name in known}
