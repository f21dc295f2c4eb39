"""The raw tensors of a `.pt2` archive: what its configs say of them, held against the members that are there."""

import math
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InvalidModelFile
from .program_schema import Json, clean_struct, parse_json
from .safetensors_header import MAX_DIMENSIONS

# Bytes per element by torch's serialized scalar type (torch/_export/serde/schema.py, ScalarType).
_CODES_BY_BYTES = {
    1: (1, 2, 12, 29, 30, 31, 32, 33),
    2: (3, 6, 13, 28),
    4: (4, 7, 9, 34),
    8: (5, 8, 10, 35),
    16: (11,),
}
ITEM_BYTES = {code: size for size, codes in _CODES_BY_BYTES.items() for code in codes}
_REMEDY = "save the model again"
_MAX_RATIO = 200  # strides of 0 repeat what is stored; who copies such a tensor pays for it
_ALWAYS_ALLOWED_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One named tensor and the member that holds its bytes; tied tensors share the member."""

    name: str
    member: str
    dtype: int
    item_bytes: int
    size_bytes: int


def read_payloads(
    data: bytes, config_name: str, sizes: Mapping[str, int]
) -> tuple[dict[str, Json], list[Payload]]:
    """The cleaned config and its tensors. `sizes` gives every member's bytes.

    Raises UnsafeModelFile for pickled tensors, InvalidModelFile for tensors whose bytes are missing, too few or of two
    dtypes; the message names the tensor.
    """
    config = clean_struct("PayloadConfig", parse_json(data, config_name), config_name)
    if "config" not in config:
        raise InvalidModelFile(f"{config_name} lists no tensors; {_REMEDY}")
    folder = posixpath.dirname(config_name)
    payloads = [_payload(name, entry, folder, sizes) for name, entry in config["config"].items()]
    dtypes: dict[str, int] = {}
    for payload in payloads:
        if dtypes.setdefault(payload.member, payload.dtype) != payload.dtype:
            raise InvalidModelFile(
                f"{payload.member} is read as two dtypes by tensor {payload.name}; {_REMEDY}"
            )
    return config, payloads


def skeleton_config(config: dict[str, Json]) -> dict[str, Json]:
    """The same names, shapes and dtypes over members of one element each."""
    entries = config["config"]
    return {"config": {name: _skeleton_entry(entry) for name, entry in entries.items()}}


def _skeleton_entry(entry: dict[str, Any]) -> dict[str, Any]:
    meta = entry["tensor_meta"]
    strides = [{"as_int": 0} for _ in meta["sizes"]]
    return {**entry, "tensor_meta": {**meta, "strides": strides, "storage_offset": {"as_int": 0}}}


def _payload(name: str, entry: dict[str, Any], folder: str, sizes: Mapping[str, int]) -> Payload:
    try:
        member, meta = f"{folder}/{entry['path_name']}", entry["tensor_meta"]
        item_bytes = ITEM_BYTES[meta["dtype"]]
        shape = [size["as_int"] for size in meta["sizes"]]
        strides = [stride["as_int"] for stride in meta["strides"]]
        offset = meta["storage_offset"]["as_int"]
    except KeyError as error:
        raise InvalidModelFile(f"tensor {name}: {folder} has no usable {error} for it; {_REMEDY}") from None
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS or min([*shape, *strides, offset]) < 0:
        raise InvalidModelFile(
            f"tensor {name}: shape {shape}, strides {strides}, offset {offset} disagree; {_REMEDY}"
        )
    if member not in sizes:
        raise InvalidModelFile(f"tensor {name}: member {member} is missing; {_REMEDY}")
    extent = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    needed = extent * item_bytes if math.prod(shape) else 0
    if sizes[member] < needed or sizes[member] % item_bytes:
        raise InvalidModelFile(
            f"tensor {name}: member {member} has {sizes[member]} bytes, but shape {shape} needs {needed}; {_REMEDY}"
        )
    if math.prod(shape) * item_bytes > max(_ALWAYS_ALLOWED_BYTES, _MAX_RATIO * sizes[member]):
        raise InvalidModelFile(
            f"tensor {name}: shape {shape} repeats the {sizes[member]} bytes of member {member} too often; {_REMEDY}"
        )
    return Payload(
        name=name, member=member, dtype=meta["dtype"], item_bytes=item_bytes, size_bytes=sizes[member]
    )
