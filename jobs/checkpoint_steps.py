"""The steps of a bare checkpoint: every task converts one output shard, the last one completes the artifact.

Tensors are read one by one with range requests; no task holds more than its own shard.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fleetpress.compression.checkpoint_layers import HEADS, checkpoint_layers, select_checkpoint
from fleetpress.compression.errors import TargetError
from fleetpress.compression.layers import Layer
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.quantization.compressed_tensors import (
    checkpoint_scheme,
    pack_checkpoint_weight,
    quantization_config,
)
from fleetpress.compression.scheme import bits_per_weight
from fleetpress.storage import canonical_json
from fleetpress.storage.artifact import (
    ArtifactFile,
    artifact_key,
    write_artifact,
)
from fleetpress.storage.checkpoint import Checkpoint, open_checkpoint, read_tensor
from fleetpress.storage.errors import ArtifactCorrupt, SourceChanged
from fleetpress.storage.sources import CONFIG, INDEX, WEIGHTS
from fleetpress.storage.store import open_store
from fleetpress.storage.tensors import DTYPES

from .errors import ModelError
from .manifest import companions, complete
from .materials import Payload, check_finite, read_file, record, remembered
from .quantizing import Choice, description, scheme_of
from .tasks import Output, StepResult

_WEIGHTS = ("F64", "F32", "F16", "BF16")  # dtypes that are quantized; all others are carried over


def opened(payload: Payload) -> Checkpoint:
    """The headers of the checkpoint as the plan saw it.

    Raises SourceChanged if it is another one now, ModelError if it is quantized already.
    """
    model = payload["model"]
    seen = repr((model["uri"], [file["etag"] for file in model["files"]]))
    key = f"checkpoint-{hashlib.sha256(seen.encode()).hexdigest()}"
    checkpoint = remembered(key, lambda: _pinned(open_checkpoint(model["uri"]), model["files"]))
    check_plain(checkpoint)
    return checkpoint


def _pinned(checkpoint: Checkpoint, planned: Sequence[Mapping[str, Any]]) -> Checkpoint:
    etags = {file["path"]: file["etag"] for file in planned}
    for file in (*checkpoint.files, *checkpoint.other_files):
        if etags.get(file.path) != file.etag:
            raise SourceChanged(
                f"{checkpoint.root}/{file.path} has changed since the run began; run again when the upload is complete"
            )
    return checkpoint


def check_plain(checkpoint: Checkpoint) -> None:
    """Raises ModelError for a checkpoint that is quantized already."""
    if checkpoint.quantized_by:
        raise ModelError(
            f"{checkpoint.uri} is quantized already (config.json says by {checkpoint.quantized_by}); "
            "give the original checkpoint as source"
        )


def chosen_layers(checkpoint: Checkpoint, options: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers that the recipe quantizes. Raises TargetError if there are none."""
    return choose(checkpoint, options).layers


def choose(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Choice:
    """The layers that the recipe quantizes, and those that it would but that would grow. Raises TargetError."""
    targets, ignore = tuple(options.get("targets", ())), tuple(options.get("ignore", ()))
    scheme = scheme_of(options)
    selection = select_checkpoint(_known(checkpoint), targets, ignore)
    skipped: dict[str, str] = {}
    for layer in selection.layers:
        info = checkpoint.tensors[layer.weights[0]].info
        fitting, dtype = checkpoint_scheme(scheme, info.shape[1]), DTYPES[info.dtype]
        if bits_per_weight(fitting, info.shape, dtype) >= 8 * dtype.itemsize:
            skipped[layer.name] = (
                f"rows of {info.shape[1]} divide into groups of {fitting.group_size} only: packed it would be larger"
            )
    taken = tuple(layer for layer in selection.layers if layer.name not in skipped)
    if not taken:
        transposed = any(layer.kind == "Conv1D" for layer in _known(checkpoint))
        remedy = (
            "its layers are Conv1D, which checkpoints cannot hold packed; export the model to a program (.pt2)"
            if transposed
            else "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "widen its targets"
        )
        raise TargetError(f"{checkpoint.uri}: quantize reaches no layer; {remedy}")
    return Choice(layers=taken, skipped=skipped, unused_ignores=selection.unused_ignores)


def convert(payload: Payload) -> StepResult:
    """Read the tensors of one shard, quantize those that the recipe names, and write the shard into the artifact."""
    checkpoint, options = opened(payload), payload["options"]
    scheme = scheme_of(options)
    layers = {layer.weights[0]: layer for layer in chosen_layers(checkpoint, options)}
    written: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for name in payload["tensors"]:
        value = read_tensor(checkpoint, name)
        if name.endswith((".weight", ".bias")):  # buffers such as masks may be infinite by intention
            check_finite(checkpoint.uri, {name: value})
        layer = layers.get(name)
        if layer is None:
            written[name] = value
            continue
        fitting = checkpoint_scheme(scheme, value.shape[1])
        (quantized,) = quantize_layer(layer, {name: value}, fitting, QUANTIZERS[options["method"]]).values()
        packed = pack_checkpoint_weight(name, quantized)
        written |= packed
        stored = sum(part.nbytes for part in packed.values())
        facts.append({**description(quantized, value), "layer": layer.name, "bytes_after": stored})
    file = shard_file(payload["index"], payload["count"])
    store, model = open_store(payload["output"]), payload["model"]["name"]
    (done,) = write_artifact(
        store, model, payload["artifact"], {file: save(written, metadata={"format": "pt"})}
    )
    return StepResult(
        result={
            "file": done.as_dict(),
            "tensors": sorted(written),
            "tensor_bytes": sum(value.nbytes for value in written.values()),
            "weights": facts,
        },
        outputs=(
            Output(key=artifact_key(model, payload["artifact"], file), bytes=done.bytes, sha256=done.sha256),
        ),
    )


def assemble(payload: Payload) -> StepResult:
    """Complete the artifact: config, index and every other file of the source; then manifest and pointer."""
    checkpoint = opened(payload)
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    parts = [record(payload, own).result for own in payload["stages"]["convert"]]
    shards = [ArtifactFile(**part["file"]) for part in parts]
    for shard in shards:
        _check(store.get(artifact_key(name, digest, shard.path)), shard)
    metrics = _metrics(payload, checkpoint, parts, sum(shard.bytes for shard in shards))
    files = {CONFIG: _config(payload, checkpoint), **companions(payload, metrics)}
    if len(shards) > 1:
        files[INDEX] = _index(parts)
    for file in checkpoint.other_files:
        if file.path not in files:
            files[file.path] = read_file(checkpoint.root, file)
    written = [*shards, *write_artifact(store, name, digest, files)]
    written.sort(key=lambda file: file.path)
    return complete(payload, metrics, kind="checkpoint", form="safetensors", files=written)


def _known(checkpoint: Checkpoint) -> tuple[Layer, ...]:
    tensors = {name: place.info for name, place in checkpoint.tensors.items()}
    return checkpoint_layers({name: info.shape for name, info in tensors.items() if info.dtype in _WEIGHTS})


def shard_file(index: int, count: int) -> str:
    """The conventional name of the `index`-th of `count` shards."""
    return WEIGHTS if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def _check(data: bytes, file: ArtifactFile) -> None:
    if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise ArtifactCorrupt(
            f"{file.path} is not what was written: check the store, delete it and run again"
        )


def _config(payload: Payload, checkpoint: Checkpoint) -> bytes:
    options = payload["recipe"]["quantize"]
    scheme = scheme_of(options)
    chosen = {layer.name: layer for layer in chosen_layers(checkpoint, options)}
    kinds = sorted({layer.kind for layer in chosen.values()})
    known = _known(checkpoint)
    # Of any kind: what its path calls an embedding may be a Linear to the model's code.
    ignored = [layer.name for layer in known if layer.name not in chosen]
    # A tied head is a layer of the model without tensors of its own: readers must not look for packed ones.
    ignored += [head for head in HEADS if head not in {layer.name for layer in known}]
    exceptions: dict[int, list[str]] = {}
    for name, layer in chosen.items():
        size = checkpoint_scheme(scheme, checkpoint.tensors[layer.weights[0]].info.shape[1]).group_size
        if size is not None and size != scheme.group_size:
            exceptions.setdefault(size, []).append(name)
    config = dict(checkpoint.config or {})
    config["quantization_config"] = quantization_config(scheme, kinds, ignored, exceptions=exceptions)
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _index(parts: Sequence[Mapping[str, Any]]) -> bytes:
    weight_map = {name: part["file"]["path"] for part in parts for name in part["tensors"]}
    total = sum(part["tensor_bytes"] for part in parts)
    return canonical_json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})


def _metrics(
    payload: Payload, checkpoint: Checkpoint, parts: Sequence[Mapping[str, Any]], size_bytes: int
) -> dict[str, Any]:
    weights = {facts["layer"]: facts for part in parts for facts in part["weights"]}
    counts = {name: math.prod(place.info.shape) for name, place in checkpoint.tensors.items()}
    before_bytes = sum(file.bytes for file in checkpoint.files)
    after_bytes = sum(part["tensor_bytes"] for part in parts)
    choice = choose(checkpoint, payload["recipe"]["quantize"])
    side = {"metric": None, "value": None, "parameters": sum(counts.values())}
    return {
        "before": {**side, "bytes": before_bytes},
        "after": {**side, "bytes": size_bytes},
        "compression_ratio": round(before_bytes / size_bytes, 4),
        "bits_per_weight": round(8 * after_bytes / max(1, sum(counts.values())), 4),
        "layers": [
            _layer_entry(layer, checkpoint, weights.get(layer.name), choice.skipped.get(layer.name))
            for layer in _known(checkpoint)
        ],
        "warnings": [f"ignore {entry!r} matches no layer" for entry in choice.unused_ignores],
    }


def _layer_entry(
    layer: Layer, checkpoint: Checkpoint, facts: Mapping[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    size_bytes = checkpoint.tensors[layer.weights[0]].info.size_bytes
    return {
        "name": layer.name,
        "kind": layer.kind,
        "sparsity": 0.0,
        "removed_units": [],
        "num_bits": facts["scheme"]["num_bits"] if facts else None,
        "group_size": facts["group_size"] if facts else None,
        "bytes_before": size_bytes,
        "bytes_after": facts["bytes_after"] if facts else size_bytes,
        "sqnr_db": facts["sqnr_db"] if facts else None,
        "skipped": None if facts else f"quantize: {reason or 'not among the targets'}",
    }
