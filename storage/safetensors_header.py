"""The header of a `.safetensors` file by one small range, checked before a single offset is believed.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data, which
the tensors cover without gaps or overlaps (https://github.com/huggingface/safetensors, "Format").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InvalidModelFile
from .json_text import parse_json
from .store import ObjectStore

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # NumPy's limit, and torch's for most of what it does
LENGTH_BYTES = 8
_FIRST_BYTES = 128 << 10  # holds the headers of most shards
_REMEDY = "save or upload it again"

BITS_BY_DTYPE = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a file; `offset_bytes` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """All tensors of a file in the order of their bytes, and the free text beside them."""

    tensors: Mapping[str, TensorInfo]
    data_start: int
    metadata: Mapping[str, str]


def read_header(
    store: ObjectStore, key: str, etag: str | None = None, *, size_bytes: int | None = None
) -> SafetensorsHeader:
    """The header of object `key`, pinned to `etag`; `size_bytes`: the object's size, which a listing has told.

    Raises InvalidModelFile (file and tensor named), store errors.
    """
    where = f"{store.uri}/{key}"
    file_bytes = store.head(key).size_bytes if size_bytes is None else size_bytes
    first = store.get_range(key, 0, min(file_bytes, _FIRST_BYTES), etag=etag)
    end = LENGTH_BYTES + _header_length(first, file_bytes, where)
    rest = store.get_range(key, len(first), end - len(first), etag=etag) if end > len(first) else b""
    return _parse((first + rest)[LENGTH_BYTES:end], file_bytes, where)


def header_of(data: bytes, where: str) -> SafetensorsHeader:
    """The header of a whole file in memory; `where` names it in errors. Raises InvalidModelFile."""
    length = _header_length(data, len(data), where)
    return _parse(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), where)


def _header_length(start: bytes, file_bytes: int, where: str) -> int:
    if file_bytes < LENGTH_BYTES:
        raise InvalidModelFile(f"{where} has {file_bytes} bytes, too few for a safetensors file; {_REMEDY}")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidModelFile(
            f"{where} states a header of {length} bytes: it is no safetensors file; {_REMEDY}"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise InvalidModelFile(
            f"{where} is cut short: header of {length} bytes in a file of {file_bytes}; {_REMEDY}"
        )
    return length


def _parse(header: bytes, file_bytes: int, where: str) -> SafetensorsHeader:
    try:
        entries = parse_json(header)
    except ValueError as error:
        raise InvalidModelFile(f"{where}: the header is not valid JSON ({error}); {_REMEDY}") from None
    if not isinstance(entries, dict) or not header.startswith(b"{"):
        raise InvalidModelFile(f"{where}: the header is no JSON object; {_REMEDY}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InvalidModelFile(f"{where}: __metadata__ is no table of texts; {_REMEDY}")
    data_start = LENGTH_BYTES + len(header)
    tensors = [_tensor(name, entry, data_start, where) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes, tensor.name))
    _check_layout(tensors, data_start, file_bytes, where)
    return SafetensorsHeader(tensors={t.name: t for t in tensors}, data_start=data_start, metadata=metadata)


def _tensor(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    if any(
        "\ud800" <= letter <= "\udfff" for letter in name
    ):  # halves of characters, which JSON lets through
        raise InvalidModelFile(f"{where}: tensor {name!r} has a name that is no text; {_REMEDY}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidModelFile(f"{where}: tensor {name!r} needs dtype, shape and data_offsets; {_REMEDY}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_BY_DTYPE:
        raise InvalidModelFile(f"{where}: tensor {name!r} has the unknown dtype {dtype!r}; {_REMEDY}")
    if not _is_shape(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidModelFile(f"{where}: tensor {name!r} has a wrong shape or data_offsets; {_REMEDY}")
    size_bytes = offsets[1] - offsets[0]
    bits = math.prod(shape) * BITS_BY_DTYPE[dtype]
    if size_bytes * 8 != bits:
        raise InvalidModelFile(
            f"{where}: tensor {name!r} has {size_bytes} bytes, but {dtype} of shape {shape} needs {-(-bits // 8)};"
            f" {_REMEDY}"
        )
    if (
        math.prod(size or 1 for size in shape) >= 2**59
    ):  # torch and NumPy multiply the sizes beside a 0 as well
        raise InvalidModelFile(f"{where}: tensor {name!r} has a wrong shape or data_offsets; {_REMEDY}")
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        offset_bytes=data_start + offsets[0],
        size_bytes=size_bytes,
    )


def _is_shape(value: Any) -> bool:
    return _are_sizes(value) and len(value) <= MAX_DIMENSIONS


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_layout(tensors: list[TensorInfo], data_start: int, file_bytes: int, where: str) -> None:
    expected = data_start
    for tensor in tensors:
        end = tensor.offset_bytes + tensor.size_bytes
        if end > file_bytes:
            raise InvalidModelFile(
                f"{where} is cut short: tensor {tensor.name!r} ends at byte {end} of a file of {file_bytes}; {_REMEDY}"
            )
        if tensor.offset_bytes != expected:
            problem = (
                "overlaps the one before it" if tensor.offset_bytes < expected else "leaves a gap before it"
            )
            raise InvalidModelFile(f"{where}: tensor {tensor.name!r} {problem}; {_REMEDY}")
        expected = end
    if expected != file_bytes:
        raise InvalidModelFile(
            f"{where} has {file_bytes - expected} bytes that belong to no tensor; {_REMEDY}"
        )
