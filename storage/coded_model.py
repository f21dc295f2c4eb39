"""A program in one small file, `model.fpz`: its graph in short form, and its tensors entropy-coded.

    "fpz" and a format number  | 4 bytes
    head                       | a method byte and compressed JSON: graph, where tensors lie, how weights are quantized
    directory, decisions       | how each array is coded, and the decisions of the slow models (see `array_coding`)
    blobs                      | the arrays' own bytes
    checksum                   | CRC-32 of all that, of the head's text and of every decoded array

Lengths are written before head, directory and decisions. A stored tensor is written as its values, or as the parts of a
quantized weight: named arrays (codes, scales, a codebook ...) with facts in JSON that say what they mean to whoever
quantized it. The checksum is also over what comes out, so a library that decodes otherwise is noticed like a lost byte.
"""

import json
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from .array_coding import Array, ArrayReader, ArrayWriter, Layout
from .errors import ArtifactCorrupt
from .graph_form import long_form, short_form
from .graph_words import dictionary
from .json_text import parse_json
from .program_payloads import Members, StoredTensor, members_with
from .program_schema import Json
from .safetensors_header import MAX_DIMENSIONS
from .varints import ByteReader, varint

MODEL_FILE = "model.fpz"

_MAGIC = b"fpz\x01"
_DEFLATE, _LZMA = 0, 1
_FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 24, "lc": 3, "lp": 0, "pb": 0}]
_MOST_HEAD_BYTES = 16 << 20
_MOST_SIGNS = 2_000_000
_MOST_PARTS = 16
_ALWAYS_ALLOWED_BYTES = 64 << 20
_MAX_RATIO = (
    1000  # of decoded bytes to those of the file: codes and floats of weights that are 99 % zero are 430
)
_REMEDY = "publish the model again"

# Layouts by safetensors' names; only floats are told apart from whole numbers of as many bytes.
DTYPES = {
    "BOOL": ("<u1", False),
    "U8": ("<u1", False),
    "I8": ("<u1", False),
    "F8_E4M3": ("<u1", False),
    "F8_E5M2": ("<u1", False),
    "F16": ("<f2", True),
    "BF16": ("<u2", True),
    "I16": ("<i2", False),
    "F32": ("<f4", True),
    "I32": ("<i4", False),
    "F64": ("<f8", True),
    "I64": ("<i8", False),
    "C64": ("<u8", False),
}


@dataclass(frozen=True, kw_only=True)
class CodedPart:
    """One array of a quantized weight: `dtype` by safetensors' name, `array` with the NumPy dtype of `DTYPES`."""

    dtype: str
    array: Array


@dataclass(frozen=True, kw_only=True)
class CodedWeight:
    """A weight by its parts, and what they mean in JSON values. Its shape and dtype are the program's."""

    parts: Mapping[str, CodedPart]
    facts: Mapping[str, Json]
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class CodedModel:
    """A model that was read: the members of its program but for the weights that are quantized, and these by name."""

    members: Members
    weights: Mapping[str, CodedWeight] = field(default_factory=dict)


def write_model(members: Members, weights: Mapping[str, CodedWeight]) -> tuple[bytes, dict[str, int]]:
    """The file of a program, and the bytes that each of its stored tensors takes in it.

    `members` are those of the program over plain weights; of the tensors in `weights` only the parts are written.
    Bytes of decisions are counted rounded up. Raises ArtifactCorrupt for a program whose file could not be read again.
    """
    templates: list[Json] = []
    kinds: list[int] = []
    writer = ArrayWriter()
    checksums: list[int] = []
    sizes: dict[str, int] = {}

    def add(array: Array, *, is_float: bool) -> int:
        checksums.append(_crc(array))
        return writer.add(array, is_float=is_float)

    for payload in members.payloads:
        weight = next((weights[name] for name in payload.names if name in weights), None)
        if weight is None:
            kinds.append(0)
            taken = add(members.array(payload), is_float=payload.layout.is_float)
        else:
            template = _template(weight, payload.shape)
            if template not in templates:
                templates.append(template)
            kinds.append(1 + templates.index(template))
            taken = sum(
                add(part.array, is_float=DTYPES[part.dtype][1]) for _, part in sorted(weight.parts.items())
            )
        sizes |= dict.fromkeys(payload.names, taken)
    head = [short_form(members.graph), members.placement(), templates, kinds if templates else []]
    while not head[-1]:
        head.pop()
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=True).encode()
    directory, decisions, blobs = writer.sections()
    sections = [_compressed(text), directory, decisions]
    body = b"".join([_MAGIC, *(varint(len(section)) + section for section in sections), *blobs])
    return body + _checksum(body, text, checksums), sizes


def read_model(data: bytes) -> CodedModel:
    """The model in the bytes of a file. Raises ArtifactCorrupt, InvalidModelFile and UnsafeModelFile."""
    if data[: len(_MAGIC)] != _MAGIC:
        known = "of another version" if data[:3] == _MAGIC[:3] else "no coded model (it begins otherwise)"
        raise ArtifactCorrupt(f"the file is {known}; {_REMEDY}")
    try:
        return _read(data)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        told = str(error) if type(error) is ValueError else "its head is damaged"
        raise ArtifactCorrupt(f"the file is damaged: {told}; {_REMEDY}") from None


def _read(data: bytes) -> CodedModel:
    reader = ByteReader(memoryview(data)[len(_MAGIC) :])
    sections = [reader.view(reader.number(reader.left)) for _ in range(3)]
    if reader.left < 4:
        raise ValueError("it is cut short")
    blobs, checksum = reader.view(reader.left - 4), reader.take(4)
    text = _decompressed(sections[0])
    head = parse_json(text, most_signs=_MOST_SIGNS)
    rest: list[Json] = [None, [], []]
    graph, placement, templates, kinds = list(head) + rest[len(head) - 1 :]
    members = members_with(long_form(graph), placement)
    kinds = kinds or [0] * len(members.payloads)
    plans = [
        _plan(payload, templates[kind - 1] if _size(kind) else None)
        for payload, kind in zip(members.payloads, kinds, strict=True)
    ]
    _check_size(members, plans, len(data))
    checksums: list[int] = []
    found: dict[str, CodedWeight] = {}
    with ThreadPoolExecutor() as pool:
        arrays = ArrayReader(bytes(sections[1]), bytes(sections[2]), blobs, pool)
        waiting = [{name: arrays.read(layout) for name, (_, layout) in plan.parts.items()} for plan in plans]
        arrays.end()
        for payload, plan, parts in zip(members.payloads, plans, waiting, strict=True):
            decoded = {name: finish() for name, finish in parts.items()}
            checksums += [_crc(array) for array in decoded.values()]
            if plan.template is None:
                members.give(payload, decoded[""])
                continue
            axis, facts, _ = plan.template
            weight = CodedWeight(
                parts={
                    name: CodedPart(dtype=plan.parts[name][0], array=array) for name, array in decoded.items()
                },
                facts=facts,
                axis=axis,
            )
            found |= dict.fromkeys(payload.names, weight)
    if checksum != _checksum(memoryview(data)[:-4], text, checksums):
        raise ValueError("what it decodes to is not what was written")
    return CodedModel(members=members, weights=found)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The arrays of one stored tensor by part (a plain one has the part ""), with dtype and layout."""

    template: Json
    parts: dict[str, tuple[str, Layout]]


def _plan(payload: StoredTensor, template: Json) -> _Plan:
    if template is None:
        return _Plan(template=None, parts={"": ("", payload.layout)})
    axis, facts, parts = template
    rows, columns = _matrix(payload.shape, axis)
    if not isinstance(facts, dict) or not 0 < len(parts) <= _MOST_PARTS:
        raise ValueError("a weight has no parts that can be read")
    planned = {}
    for name, (dtype, sizes) in sorted(parts.items()):
        shape = tuple(
            {"r": rows, "c": columns}[size] if isinstance(size, str) else _size(size) for size in sizes
        )
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"part {name} has {len(shape)} dimensions")
        kind, is_float = DTYPES[dtype]
        planned[name] = dtype, Layout(shape=shape, dtype=kind, is_float=is_float)
    return _Plan(template=template, parts=planned)


def _template(weight: CodedWeight, shape: tuple[int, ...]) -> Json:
    """What weights that are quantized alike have in common: shapes in terms of rows and columns."""
    rows, columns = _matrix(shape, weight.axis)
    parts = {}
    for name, part in weight.parts.items():
        short: list[int | str] = list(part.array.shape)
        if short[:1] == [rows] and rows > 1:
            short[0] = "r"
        if len(short) == 2 and short[1] == columns and columns > 1:
            short[1] = "c"
        parts[name] = [part.dtype, short]
    return json.loads(json.dumps([weight.axis, dict(weight.facts), parts]))


def _matrix(shape: tuple[int, ...], axis: Any) -> tuple[int, int]:
    rows = shape[_size(axis)]
    columns = 1
    for place, size in enumerate(shape):
        columns *= 1 if place == axis else size
    return rows, columns


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError("a size is no whole number")
    return value


def _check_size(members: Members, plans: Sequence[_Plan], file_bytes: int) -> None:
    """Nothing is allocated before it is known how much that will be."""
    decoded = sum(layout.size_bytes for plan in plans for _, layout in plan.parts.values())
    weights = sum(
        payload.layout.size_bytes
        for payload, plan in zip(members.payloads, plans, strict=True)
        if plan.template is not None
    )
    if decoded + weights > max(_ALWAYS_ALLOWED_BYTES, _MAX_RATIO * file_bytes):
        raise ValueError(f"{file_bytes} bytes say they hold {decoded + weights}")


def _checksum(body: bytes | memoryview, text: bytes, checksums: Sequence[int]) -> bytes:
    numbers = (zlib.crc32(body), zlib.crc32(text), *checksums)
    parts = b"".join(number.to_bytes(4, "little") for number in numbers)
    return zlib.crc32(parts).to_bytes(4, "little")


def _crc(array: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _compressed(text: bytes) -> bytes:
    """DEFLATE with the format's dictionary for small graphs, LZMA for those whose own words are more."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _dictionary())
    small = bytes([_DEFLATE]) + deflate.compress(text) + deflate.flush()
    close = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    large = bytes([_LZMA]) + close.compress(text) + close.flush()
    return min(small, large, key=len)


def _decompressed(data: memoryview) -> bytes:
    method = data[0]
    inflate: Callable[[bytes, int], bytes]
    try:
        if method == _DEFLATE:
            decoder: Any = zlib.decompressobj(-15, _dictionary())
        elif method == _LZMA:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
        else:
            raise ValueError(f"its head is written by method {method}")
        inflate = decoder.decompress
        text = inflate(bytes(data[1:]), _MOST_HEAD_BYTES + 1)
    except (zlib.error, lzma.LZMAError):
        raise ValueError("its head cannot be unpacked") from None
    if len(text) > _MOST_HEAD_BYTES:
        raise ValueError("its head is too large for a graph")
    return text


@cache
def _dictionary() -> bytes:
    return dictionary()
