"""Which models a source names: files, folders and patterns to `ModelSource`s, by listings alone."""

import os
import posixpath
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from .errors import ObjectNotFound
from .globs import has_glob, matches, split_pattern
from .near_misses import hint
from .store import ObjectInfo, open_store
from .uri import basename, is_s3, join, normalize, split, validate_key

Kind = Literal["program", "checkpoint", "module"]

KIND_BY_SUFFIX: dict[str, Kind] = {
    ".pt2": "program",
    ".safetensors": "checkpoint",
    ".pt": "module",
    ".pth": "module",
    ".bin": "module",
}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The same weights in other formats; they are neither read nor published beside compressed ones.
_OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".pt2",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ot",
    ".ckpt",
)
_LOOKED_FOR = (
    "looked for *.pt2, *.safetensors, *.pt, *.pth, *.bin, or a folder with config.json and model.safetensors"
)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One object that was read: its key below the store of its source, and what pins it."""

    path: str
    etag: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """One model. `uri` is the file, or the folder of a Hugging Face model; paths of `files` are below `root`."""

    name: str
    kind: Kind
    uri: str
    root: str
    files: tuple[SourceFile, ...]


def find_models(source: str) -> list[ModelSource]:
    """The models that `source` names, by the bytes of their uris; no model is read.

    `source`: a model file, a folder that holds one model, or either with `*`, `?`, `[...]` in its last segments
    (`s3://models/llm/*/`). A file's model is named by its stem, or by its folder if it is called `model.*`.
    Raises ObjectNotFound (nothing there, or no model in it), InvalidUri, and what the store raises.
    """
    if has_glob(source):
        return _find_by_pattern(source)
    if _kind(normalize(source)) is not None:
        root, key = split(source)
        try:
            info = open_store(root).head(key)
        except ObjectNotFound as error:
            raise ObjectNotFound(f"{error}{hint(source)}") from None
        return [_file_model(root, info)]
    store = open_store(source)
    found = _folder_model(store.uri, store.list())
    if found is None:
        raise ObjectNotFound(
            f"{source} holds no model: {_LOOKED_FOR}; name one file or a pattern if it holds several{hint(source)}"
        )
    return [found]


def _folder_name(folder: str) -> str:
    """The folder's last part; the working folder has a name, too."""
    return basename(folder if is_s3(folder) else os.path.abspath(folder))


def is_checkpoint_folder(names: Collection[str]) -> bool:
    """Whether a folder with these names is a Hugging Face model in safetensors."""
    return CONFIG in names and (WEIGHTS in names or INDEX in names)


def belongs_to_checkpoint(key: str) -> bool:
    """Whether a file of a checkpoint's folder is part of the model: no hidden file, no weights in another format."""
    hidden = any(part.startswith(".") for part in key.split("/"))
    return not hidden and not key.endswith(_OTHER_WEIGHTS)


def source_file(info: ObjectInfo) -> SourceFile:
    """The pinned form of a listing's entry."""
    return SourceFile(path=info.key, etag=info.etag, bytes=info.size_bytes)


def _kind(path: str) -> Kind | None:
    return KIND_BY_SUFFIX.get(posixpath.splitext(path)[1])


def _find_by_pattern(source: str) -> list[ModelSource]:
    root, pattern = split_pattern(source)
    store = open_store(root)
    files: list[ObjectInfo] = []
    folders: dict[str, list[ObjectInfo]] = {}
    for info in store.list():
        parts = info.key.split("/")
        if not matches(parts[: len(pattern)], pattern):
            continue
        if len(parts) == len(pattern):
            files.append(info)
        else:
            folders.setdefault("/".join(parts[: len(pattern)]), []).append(info)
    found = [_file_model(root, info) for info in files if _kind(info.key) and not source.endswith("/")]
    for folder, infos in folders.items():
        below = [
            ObjectInfo(key=i.key.removeprefix(folder + "/"), size_bytes=i.size_bytes, etag=i.etag)
            for i in infos
        ]
        model = _folder_model(join(root, folder), below)
        found += [model] if model else []
    if not found:
        raise ObjectNotFound(f"{source} matches no model below {root}: {_LOOKED_FOR}{hint(source)}")
    return sorted(found, key=lambda model: model.uri.encode())


def _file_model(root: str, info: ObjectInfo) -> ModelSource:
    """The model in object `info` of store `root`; its own store is the folder it lies in."""
    uri = join(root, info.key)
    folder, key = split(uri)
    kind = _kind(key)
    assert kind is not None
    stem = posixpath.splitext(key)[0]
    name = _folder_name(folder) if stem == "model" else stem
    file = SourceFile(path=key, etag=info.etag, bytes=info.size_bytes)
    return ModelSource(name=validate_key(name), kind=kind, uri=uri, root=folder, files=(file,))


def _folder_model(folder: str, infos: Iterable[ObjectInfo]) -> ModelSource | None:
    """The one model that lies directly in `folder`: `model.pt2`, else a checkpoint, else the only model file."""
    by_name = {info.key: info for info in infos}
    direct = {name: info for name, info in by_name.items() if "/" not in name and _kind(name) is not None}
    name = validate_key(_folder_name(folder))
    if "model.pt2" not in direct and is_checkpoint_folder(by_name):
        files = tuple(
            source_file(info) for key, info in sorted(by_name.items()) if belongs_to_checkpoint(key)
        )
        return ModelSource(name=name, kind="checkpoint", uri=folder, root=folder, files=files)
    named = [info for key, info in direct.items() if posixpath.splitext(key)[0] == "model"]
    candidates = [direct["model.pt2"]] if "model.pt2" in direct else named or list(direct.values())
    if len(candidates) != 1:
        return None
    model = _file_model(folder, candidates[0])
    return ModelSource(name=name, kind=model.kind, uri=model.uri, root=folder, files=model.files)
