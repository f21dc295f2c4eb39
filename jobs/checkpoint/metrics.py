"""What is told of a published checkpoint: its index, and the numbers of every layer."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fleetpress.compression.selection import Layer
from fleetpress.compression.treatment import KEPT, Treatment
from fleetpress.storage import canonical_json
from fleetpress.storage.checkpoint import Checkpoint
from fleetpress.storage.safetensors_header import TensorInfo

from ..validation import Quality
from .choice import Choice
from .layout import Item, stored_bytes
from .stream import Sums

Headers = Mapping[str, Mapping[str, TensorInfo]]  # of the shards, by file


def add_up(sums: Sums, more: Mapping[str, Sequence[float]]) -> None:
    """Adds the squares of some tasks' layers to those of others, in the order of the calls."""
    for layer, (signal, noise) in more.items():
        before = sums.get(layer, (0.0, 0.0))
        sums[layer] = before[0] + signal, before[1] + noise


def index_of(shards: Headers) -> bytes:
    """The `model.safetensors.index.json` of several shards."""
    weight_map = {name: path for path, tensors in shards.items() for name in tensors}
    total = _tensor_bytes(shards)
    return canonical_json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensor_bytes(shards: Headers) -> int:
    return sum(tensor.size_bytes for tensors in shards.values() for tensor in tensors.values())


def metrics_of(
    checkpoint: Checkpoint,
    choice: Choice,
    shards: Headers,
    sums: Sums,
    *,
    size_bytes: int,
    methods: Mapping[str, str] = MappingProxyType({}),
    quality: Quality | None = None,
) -> dict[str, Any]:
    """What goes into `metrics.json`; `size_bytes` are those of all shards, `methods` those of calibrated layers."""
    counts = sum(math.prod(place.info.shape) for place in checkpoint.tensors.values())
    before_bytes = sum(file.bytes for file in checkpoint.files)
    before: dict[str, Any] = {"metric": None, "value": None, "parameters": counts, "bytes": before_bytes}
    after = {**before, "bytes": size_bytes}
    if quality is not None:
        told_before, told_after = quality.facts()
        before |= told_before
        after |= told_after
    items = {item.layer: item for item in choice.items if item.layer is not None}
    return {
        "before": before,
        "after": after,
        "compression_ratio": round(before_bytes / size_bytes, 4),
        "bits_per_weight": round(8 * _tensor_bytes(shards) / max(1, counts), 4),
        "layers": [
            {
                **_layer_entry(
                    layer, items[layer.name], sums.get(layer.name), choice.skipped.get(layer.name)
                ),
                **({"method": methods[layer.name]} if layer.name in methods else {}),
            }
            for layer in choice.known
            if layer.name in items
        ],
        "warnings": [*choice.warnings, *_unobserved(choice, methods)],
    }


def _unobserved(choice: Choice, methods: Mapping[str, str]) -> list[str]:
    """Layers in which another method than the one asked for was used, because nothing was seen of their inputs."""
    return [
        f"{layer}: what it reads was not seen, so {method} was used"
        for layer, method in methods.items()
        if method != ", ".join(_asked(choice.treated[layer]))
    ]


def _asked(treatment: Treatment) -> list[str]:
    options = dict(treatment.sparsity)
    zeroing = [options["method"]] if options else []
    return [*zeroing, treatment.method] if treatment.scheme is not None else zeroing


def _layer_entry(
    layer: Layer, item: Item, squares: tuple[float, float] | None, reason: str | None
) -> dict[str, Any]:
    scheme = item.treatment.scheme
    if reason is None and item.treatment == KEPT:
        reason = "quantize: not among the targets"
    return {
        "name": layer.name,
        "kind": layer.kind,
        "sparsity": _sparsity(item),
        "removed_units": [],
        "num_bits": scheme.num_bits if scheme else None,
        "group_size": scheme.group_size if scheme else None,
        "bytes_before": item.size_bytes,
        "bytes_after": sum(map(stored_bytes, item.stored)),
        "sqnr_db": None if squares is None else _decibels(*squares),
        "skipped": reason,
    }


def _sparsity(item: Item) -> float:
    """The share of its weights that were zeroed."""
    options = dict(item.treatment.sparsity)
    if not options:
        return 0.0
    from fleetpress.compression.sparsity import zeroed

    return round(zeroed(options, item.shape) / math.prod(item.shape), 6)


def _decibels(signal: float, noise: float) -> float | None:
    """Signal to noise; JSON has no infinity: what did not change has no noise to measure."""
    return round(10 * math.log10(signal / noise), 4) if signal and noise else None
