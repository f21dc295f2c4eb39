"""Published artifacts from outside: list them, load them, prove them, give plain weights back."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fleetpress.storage.artifact import (
    LATEST,
    MANIFEST,
    METRICS,
    PROGRAM_FILE,
    read_manifest,
    resolve,
    verify_files,
)
from fleetpress.storage.errors import ArtifactCorrupt, InvalidModelFile, ObjectNotFound, StorageError
from fleetpress.storage.sources import CONFIG, INDEX, WEIGHTS
from fleetpress.storage.store import ObjectStore, open_store, read_json

from .errors import UsageError
from .threads import side_by_side

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from fleetpress.storage.checkpoint import Checkpoint

ExportForm = Literal["pt2", "safetensors"]
_OURS = (MANIFEST, METRICS, "recipe.yaml")


def published(output: str) -> list[dict[str, Any]]:
    """The latest artifact of every model in an output: name, digest, run, kind, format and numbers."""
    store = open_store(output)
    pointers = [key.split("/") for key in store.sizes("models/") if key.endswith(f"/{LATEST}")]
    names = [parts[1] for parts in pointers if len(parts) == 3]
    found = side_by_side(partial(_entry, store), names)
    return [entry for entry in found if entry is not None]


def _entry(store: ObjectStore, name: str) -> dict[str, Any] | None:
    try:
        return _told(store, name)
    except ObjectNotFound:
        return None
    except (ValueError, LookupError, TypeError):
        raise ArtifactCorrupt(
            f"{store.uri}/models/{name}: {LATEST}, or the {MANIFEST} or metrics.json that it leads to, "
            "is damaged; delete it and run again"
        ) from None


def _told(store: ObjectStore, name: str) -> dict[str, Any]:
    pointer = read_json(store, f"models/{name}/{LATEST}")
    place = f"models/{name}/{pointer['digest']}"
    manifest = read_json(store, f"{place}/{MANIFEST}")
    metrics = read_json(store, f"{place}/{METRICS}")
    return {
        "name": name,
        **{key: pointer[key] for key in ("digest", "run")},
        **{key: manifest[key] for key in ("kind", "format")},
        **{key: metrics[key] for key in ("before", "after", "compression_ratio", "bits_per_weight")},
    }


def load_artifact(uri: str) -> "nn.Module | dict[str, Tensor]":
    """A runnable module of a program (weights unpacked once, in eval mode), or the plain state dict of a checkpoint.

    Layers on integer kernels stay there. `uri` names the artifact, or the model's folder for its latest one. Raises
    StorageError.
    """
    manifest = read_manifest(uri)
    if manifest["kind"] == "program":
        from fleetpress.compression.modes import eval_module

        return eval_module(_plain_program(uri, manifest, keep_integers=True))
    from .checkpoint.decode import plain_tensors, whole

    checkpoint = _checkpoint(uri)
    return {plain.item.name: whole(checkpoint, plain) for plain in plain_tensors(checkpoint)}


def verify(uri: str, *, deep: bool = False) -> list[str]:
    """What is wrong with an artifact; nothing if every file is what was published and the model loads and runs.

    With `deep` a checkpoint's weights are also decoded and compared with its source, block by block.
    """
    problems = verify_files(uri)
    if problems:
        return problems
    try:
        manifest = read_manifest(uri)
        if manifest["kind"] == "program":
            if deep:
                raise UsageError(
                    f"{uri} is a program; only checkpoints can be compared weight by weight with a source"
                )
            _run_once(_program(uri, manifest))
        elif deep:
            from .checkpoint.proof import compare

            return compare(resolve(uri))
        else:
            from .checkpoint.decode import plain_tensors

            plain_tensors(_checkpoint(uri))
    except StorageError as error:
        return [str(error)]
    return []


def dequantize(uri: str, destination: str) -> list[str]:
    """Write the artifact with plain weights to `destination`; the names of the files written."""
    target = open_store(destination)
    manifest = read_manifest(uri)
    if manifest["kind"] == "program":
        from fleetpress.storage.programs import save_program

        target.put(PROGRAM_FILE, save_program(_plain_program(uri, manifest)))
        return [PROGRAM_FILE]
    return _dequantize_checkpoint(uri, destination)


def export(uri: str, form: ExportForm, destination: str) -> list[str]:
    """Write the artifact's model to `destination` in a form that others read; the names of the files written.

    "pt2": a program with packed weights, whatever its artifact holds it as; plain `torch.export.load` runs it.
    "safetensors": plain weights by their state names. Raises UsageError for a checkpoint as a program.
    """
    manifest, target = read_manifest(uri), open_store(destination)
    if manifest["kind"] != "program":
        if form == "pt2":
            raise UsageError(
                f"{uri} is a checkpoint, which has no graph; export it --to safetensors, or load it with transformers"
            )
        return _dequantize_checkpoint(uri, destination)
    if form == "safetensors":
        from safetensors.torch import save

        from fleetpress.compression.program import tensors

        # Tied weights once for each of their names: whoever loads the file need not know of them.
        values = {
            name: value.detach().clone() for name, value in tensors(_plain_program(uri, manifest)).items()
        }
        target.put(WEIGHTS, save(values))
        return [WEIGHTS]
    target.put(PROGRAM_FILE, _packed_file(uri, manifest))
    return [PROGRAM_FILE]


def _packed_file(uri: str, manifest: Mapping[str, object]) -> bytes:
    store = open_store(resolve(uri))
    if manifest.get("format") != "archive":
        return store.get(PROGRAM_FILE)
    from fleetpress.storage.coded_model import MODEL_FILE
    from fleetpress.storage.programs import save_program

    from .programs.coded_programs import packed_program

    with _naming(f"{store.uri}/{MODEL_FILE}"):
        return save_program(packed_program(store.get(MODEL_FILE)))


def _dequantize_checkpoint(uri: str, destination: str) -> list[str]:
    from .checkpoint.decode import write_plain

    source, target = open_store(resolve(uri)), open_store(destination)
    checkpoint = _checkpoint(uri)
    written, weight_map, total = write_plain(checkpoint, target)
    config = {key: value for key, value in (checkpoint.config or {}).items() if key != "quantization_config"}
    target.put(CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
    written.append(CONFIG)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        target.put(INDEX, json.dumps(index, indent=2).encode() + b"\n")
        written.append(INDEX)
    for other in checkpoint.other_files:
        if other.path not in (*_OURS, CONFIG, INDEX):
            target.put(other.path, source.get(other.path))
            written.append(other.path)
    return written


def _checkpoint(uri: str) -> "Checkpoint":
    from fleetpress.storage.checkpoint import open_checkpoint

    return open_checkpoint(resolve(uri))


def _program(uri: str, manifest: Mapping[str, object]) -> "ExportedProgram":
    """The published program as it is: of a `.pt2` with packed weights."""
    store = open_store(resolve(uri))
    if manifest.get("format") == "archive":
        from fleetpress.storage.coded_model import MODEL_FILE

        from .programs.coded_programs import decoded_program

        with _naming(f"{store.uri}/{MODEL_FILE}"):
            return decoded_program(store.get(MODEL_FILE))
    from fleetpress.storage.programs import load_program

    return load_program(store.get(PROGRAM_FILE))


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors about the content of a file begin with its name."""
    try:
        yield
    except (ArtifactCorrupt, InvalidModelFile) as error:
        raise type(error)(f"{file}: {error}") from None


def _plain_program(
    uri: str, manifest: Mapping[str, object], *, keep_integers: bool = False
) -> "ExportedProgram":
    program = _program(uri, manifest)
    if manifest.get("format") == "archive":
        return program
    from fleetpress.compression.quantization.packed_program import unpack_program

    return unpack_program(program, keep_integers=keep_integers)


def _run_once(program: "ExportedProgram") -> None:
    import torch

    from fleetpress.compression.modes import eval_module
    from fleetpress.compression.program import bind
    from fleetpress.compression.smoke import smoke_inputs

    args, kwargs = bind(program, smoke_inputs(program))
    with torch.no_grad():
        eval_module(program)(*args, **kwargs)
