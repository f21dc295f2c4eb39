"""Data shards (`.npz`, `.safetensors`, `.parquet`) to NumPy arrays, without pickles."""

import io
import math
import posixpath
import tokenize
from collections.abc import Callable
from zipfile import ZIP_STORED, ZipInfo

import numpy as np

from .errors import InvalidData, InvalidModelFile, ObjectNotFound
from .globs import has_glob, matches, split_pattern
from .near_misses import hint
from .safetensors_header import header_of
from .sources import SourceFile, source_file
from .store import ObjectStore, open_store
from .zip_files import ZipError, ZipReader

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Arrays = dict[str, Array]

_HEADER_ERRORS = (
    ValueError,
    TypeError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,  # what Python's parser says of brackets nested too deeply
)
_ALWAYS_ALLOWED_BYTES = 256 << 20
_NUMPY_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


def shards_root(uri_pattern: str) -> str:
    """The place whose store holds the shards; their paths are keys of it."""
    return split_pattern(uri_pattern)[0]


def find_shards(uri_pattern: str) -> list[SourceFile]:
    """The shards a pattern (or a plain uri) names, by path; paths are below `shards_root(uri_pattern)`.

    Raises ObjectNotFound if there are none, InvalidData for a format that is not read, InvalidUri, and store errors.
    """
    root, pattern = split_pattern(uri_pattern)
    store = open_store(root)
    if has_glob(uri_pattern):
        infos = [info for info in store.list() if matches(info.key.split("/"), pattern)]
    else:
        try:
            infos = [store.head("/".join(pattern))]
        except ObjectNotFound as error:
            raise ObjectNotFound(f"{error}; it is named as data{hint(uri_pattern)}") from None
    if not infos:
        what = f"{uri_pattern} matches no data below {root}; check the pattern and the folder"
        raise ObjectNotFound(f"{what}{hint(uri_pattern)}")
    for info in infos:
        _reader(info.key, f"{root}/{info.key}")
    return sorted((source_file(info) for info in infos), key=lambda file: file.path)


def read_shard(store: ObjectStore, file: SourceFile) -> Arrays:
    """All arrays of a shard, pinned to its etag; dimension 0 of each is the sample. bf16 comes as float32 (exact).

    Raises InvalidData naming file and array (damaged, objects or texts, ragged, different lengths), SourceChanged.
    """
    where = f"{store.uri}/{file.path}"
    read = _reader(file.path, where)
    if file.bytes == 0:
        raise InvalidData(f"{where} is empty; write the shard again")
    arrays = read(store.get(file.path, etag=file.etag), where)
    if not arrays:
        raise InvalidData(f"{where} holds no arrays; write it with `inputs` (and `targets`)")
    for name, array in arrays.items():
        if array.ndim == 0:
            raise InvalidData(
                f"{where}: array {name!r} is a single number; its dimension 0 must be the samples"
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidData(
            f"{where}: its arrays have different lengths {lengths}; write one row per sample in each"
        )
    return arrays


def _reader(path: str, where: str) -> Callable[[bytes, str], Arrays]:
    suffix = posixpath.splitext(path)[1]
    if suffix not in READERS:
        raise InvalidData(
            f"{where}: data of kind {suffix or 'unknown'!r} is not read; use {', '.join(READERS)}"
        )
    return READERS[suffix]


def _read_npz(data: bytes, where: str) -> Arrays:
    try:
        archive = ZipReader(io.BytesIO(data), len(data), always_allowed_bytes=_ALWAYS_ALLOWED_BYTES)
        names = [info.filename.removesuffix(".npy") for info in archive.infos]
        if len(set(names)) != len(names):
            raise InvalidData(f"{where} holds an array twice; write it again with numpy.savez")
        return {
            name: _npy(_unpacked(archive, info, where), name, where)
            for name, info in zip(names, archive.infos, strict=True)
        }
    except ZipError as error:
        raise InvalidData(
            f"{where} is no intact .npz file: it {error}; write it again with numpy.savez"
        ) from None


def _unpacked(archive: ZipReader, info: ZipInfo, where: str) -> bytes:
    try:
        return archive.read(info)
    except MemoryError:  # zlib does not tell how much: it joins the pieces that it has unpacked
        needed_bytes = info.file_size * (1 if info.compress_type == ZIP_STORED else 2)
        raise MemoryError(
            f"tried to allocate {needed_bytes} bytes to read {info.filename!r} of {where}"
        ) from None


def _npy(data: bytes, name: str, where: str) -> Array:
    """One `.npy` file (numpy.lib.format): the size its header claims is checked before anything is allocated."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(file)
    except _HEADER_ERRORS as error:
        raise InvalidData(f"{where}: {name!r} is no NumPy array ({error}); write it again") from None
    if dtype.kind not in "biufc":
        what = "Python objects, which would be unpickled" if dtype.hasobject else f"{dtype} values"
        raise InvalidData(f"{where}: array {name!r} holds {what}; write numbers")
    body = data[file.tell() :]
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(
        body
    ):
        raise InvalidData(f"{where}: array {name!r} of shape {shape} is cut short; write it again")
    try:
        flat = np.frombuffer(body, dtype).astype(dtype.newbyteorder("="))
        array: Array = flat.reshape(shape[::-1]).T.copy() if fortran_order else flat.reshape(shape)
    except ValueError as error:  # more dimensions, or sizes beside a 0, than NumPy takes
        raise InvalidData(f"{where}: array {name!r} of shape {shape}: {error}; write it again") from None
    return array


def _read_safetensors(data: bytes, where: str) -> Arrays:
    try:
        header = header_of(data, where)
    except InvalidModelFile as error:
        raise InvalidData(str(error)) from None
    arrays: Arrays = {}
    for name, info in header.tensors.items():
        body = data[info.offset_bytes : info.offset_bytes + info.size_bytes]
        if info.dtype == "BF16":
            wide = np.frombuffer(body, "<u2").astype(np.uint32) << 16
            arrays[name] = wide.view(np.float32).reshape(info.shape)
        elif info.dtype in _NUMPY_DTYPES:
            little = np.dtype(_NUMPY_DTYPES[info.dtype]).newbyteorder("<")
            arrays[name] = np.frombuffer(body, little).reshape(info.shape).astype(_NUMPY_DTYPES[info.dtype])
        else:
            raise InvalidData(f"{where}: array {name!r} is {info.dtype}, which data may not be; convert it")
    return arrays


def _read_parquet(data: bytes, where: str) -> Arrays:
    from .parquet import (
        read_parquet,
    )  # pyarrow costs 0.2 s and comes with Ray: only those who use it pay for it

    return read_parquet(data, where)


READERS: dict[str, Callable[[bytes, str], Arrays]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}
