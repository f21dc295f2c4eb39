"""Checkpoints: one `.safetensors` file or a Hugging Face folder, read tensor by tensor.

Folder layout: `config.json`, and `model.safetensors` or `model.safetensors.index.json` (`weight_map`: tensor -> shard).
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import InvalidModelFile, ObjectNotFound
from .json_text import parse_json
from .safetensors_header import TensorInfo, read_header
from .sources import (
    CONFIG,
    INDEX,
    WEIGHTS,
    SourceFile,
    belongs_to_checkpoint,
    is_checkpoint_folder,
    source_file,
)
from .store import ObjectStore, open_store
from .traffic import carried
from .uri import is_valid_key, split

if TYPE_CHECKING:
    import torch

_MAX_JSON_BYTES = 100_000_000
_HEADER_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class TensorLocation:
    """Where a tensor's bytes are."""

    file: SourceFile
    info: TensorInfo


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's headers. Paths of `files` and `other_files` are keys of the store at `root`.

    `files` hold the tensors; `other_files` are config, tokenizer and what else lies beside them (the shard index, which
    a new set of shards replaces, left out). `config` is None for a bare file.
    """

    uri: str
    root: str
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorLocation]
    files: tuple[SourceFile, ...]
    other_files: tuple[SourceFile, ...]

    @property
    def quantized_by(self) -> str | None:
        """The method the weights are already quantized with, from `quantization_config`; None for plain weights."""
        found = (self.config or {}).get("quantization_config") or (self.config or {}).get(
            "compression_config"
        )
        if not found:
            return None
        return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def open_checkpoint(uri: str) -> Checkpoint:
    """Reads listings, config, index and safetensors headers; no tensor.

    Raises ObjectNotFound if there is no checkpoint, InvalidModelFile naming the file or tensor that is wrong.
    """
    if uri.endswith(".safetensors"):
        root, key = split(uri)
        store = open_store(root)
        file = source_file(store.head(key))
        tensors = _tensors_of(store, file)
        return Checkpoint(uri=uri, root=root, config=None, tensors=tensors, files=(file,), other_files=())
    store = open_store(uri)
    present = {info.key: source_file(info) for info in store.list() if belongs_to_checkpoint(info.key)}
    if not is_checkpoint_folder(present):
        raise ObjectNotFound(f"{uri} is no checkpoint: it needs {CONFIG} and {WEIGHTS} or {INDEX}")
    for file in present.values():
        if not file.etag:  # a file that may not be read: better told now than once all weights are done
            store.head(file.path)
    config = _read_json(store, present[CONFIG])
    if INDEX in present and WEIGHTS not in present:
        tensors = _sharded(store, present)
    else:
        tensors = _tensors_of(store, present[WEIGHTS])
    files = {location.file.path: location.file for location in tensors.values()}
    others = [f for key, f in present.items() if not key.endswith(".safetensors") and key != INDEX]
    return Checkpoint(
        uri=uri,
        root=store.uri,
        config=config,
        tensors=tensors,
        files=tuple(files[key] for key in sorted(files)),
        other_files=tuple(sorted(others, key=lambda file: file.path)),
    )


def read_tensor(checkpoint: Checkpoint, name: str) -> "torch.Tensor":
    """Tensor `name` on the CPU in its stored dtype, by one range pinned to the etag seen at opening.

    Raises InvalidModelFile (no such tensor, or a dtype torch has not), SourceChanged, and what the store raises.
    """
    from .tensors import tensor_from_bytes  # torch: not needed by those who read headers only

    if name not in checkpoint.tensors:
        raise InvalidModelFile(f"{checkpoint.uri} has no tensor {name!r}; see its header for the names")
    file, info = checkpoint.tensors[name].file, checkpoint.tensors[name].info
    store = open_store(checkpoint.root)
    data = (
        store.get_range(file.path, info.offset_bytes, info.size_bytes, etag=file.etag)
        if info.size_bytes
        else b""
    )
    return tensor_from_bytes(info, data)


def _tensors_of(store: ObjectStore, file: SourceFile) -> dict[str, TensorLocation]:
    header = read_header(store, file.path, file.etag, size_bytes=file.bytes)
    return {name: TensorLocation(file=file, info=info) for name, info in header.tensors.items()}


def _read_json(store: ObjectStore, file: SourceFile) -> dict[str, Any]:
    where = f"{store.uri}/{file.path}"
    if file.bytes > _MAX_JSON_BYTES:
        raise InvalidModelFile(
            f"{where} has {file.bytes} bytes, too many for JSON of this kind; upload it again"
        )
    try:
        value = parse_json(store.get(file.path, etag=file.etag))
    except ValueError as error:
        raise InvalidModelFile(f"{where} is not valid JSON ({error}); upload it again") from None
    if not isinstance(value, dict):
        raise InvalidModelFile(f"{where} is no JSON object; upload it again")
    return value


def _sharded(store: ObjectStore, present: Mapping[str, SourceFile]) -> dict[str, TensorLocation]:
    where = f"{store.uri}/{INDEX}"
    weight_map = _read_json(store, present[INDEX]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidModelFile(f"{where} has no weight_map; upload it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_valid_key(shard) or not shard.endswith(".safetensors"):
            raise InvalidModelFile(
                f"{where}: tensor {name!r} lies in {shard!r}, which is no shard of this folder"
            )
        if shard not in present:
            raise InvalidModelFile(
                f"{store.uri}/{shard} is missing, but tensor {name!r} should be in it; upload it"
            )
    by_shard = _tensors_of_all(store, [present[shard] for shard in sorted(set(weight_map.values()))])
    for name, shard in weight_map.items():
        if name not in by_shard[shard]:
            raise InvalidModelFile(
                f"{store.uri}/{shard} has no tensor {name!r}, but {INDEX} says so; upload both again"
            )
    return {name: by_shard[shard][name] for name, shard in weight_map.items()}


def _tensors_of_all(store: ObjectStore, files: Iterable[SourceFile]) -> dict[str, dict[str, TensorLocation]]:
    """By path, many headers at a time; of several that are wrong, the first one is named."""
    asked = list(files)
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        found = pool.map(carried(partial(_tensors_of, store)), asked)
        return {file.path: tensors for file, tensors in zip(asked, found, strict=True)}
