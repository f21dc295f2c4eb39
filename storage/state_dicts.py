"""State dicts (`.pt`, `.pth`, `.bin`, `.safetensors`) to tensors, without running what they may carry."""

import io
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .errors import InvalidModelFile, UnsafeModelFile
from .memory import asked_bytes, is_out_of_memory
from .quoting import one_line, quoted
from .safetensors_header import header_of
from .tensors import tensor_from_bytes
from .zip_files import ZipError, ZipReader, ends_plainly

_ZIP = b"PK\3\4"
_ALWAYS_ALLOWED_BYTES = 64 << 20
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_MOST_WRAPPERS = 8
# What torch would run although no tensor needs it: a few bytes make gigabytes, or minutes of work, of it.
_COSTLY = re.compile(rb"c(?:builtins|__builtin__)\n(bytearray)\n|c_codecs\n(encode)\n")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|global ([\w.]+)")
_LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def load_state_dict(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors by name, on the CPU; a wrapper like `{"state_dict": ...}` around them is taken off.

    Raises UnsafeModelFile if the file needs pickled code (the message names what it asked for; nothing of it ran),
    InvalidModelFile if it is damaged or holds anything but named tensors.
    """
    if not data:
        raise InvalidModelFile("the state dict is empty; save it again")
    if _is_safetensors(data):
        header = header_of(data, "the state dict")
        return {
            name: tensor_from_bytes(info, data[info.offset_bytes : info.offset_bytes + info.size_bytes])
            for name, info in header.tensors.items()
        }
    _check_pickle(_pickle_in_zip(data) if data.startswith(_ZIP) else data)
    tensors = _named_tensors(_unpickle(data))
    _check_sizes(tensors, len(data))
    return tensors


def _is_safetensors(data: bytes) -> bool:
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data)


def _pickle_in_zip(data: bytes) -> bytes:
    """The pickle of a ZIP. torch stores what it saves as it is: one that unpacks to much more is not of its making."""
    try:
        archive = ZipReader(io.BytesIO(data), len(data))
        total = sum(info.file_size for info in archive.infos)
        pickles = [archive.read(i) for i in archive.infos if i.filename.rpartition("/")[2] == "data.pkl"]
        if not ends_plainly(data):
            raise ZipError("has something behind its end")
    except ZipError as error:
        raise InvalidModelFile(f"the state dict is damaged: it {error}; save it again") from None
    if total > max(_ALWAYS_ALLOWED_BYTES, 2 * len(data)):
        raise InvalidModelFile(
            f"the state dict unpacks from {len(data)} to {total} bytes, a likely bomb; save it with torch.save"
        )
    return b"".join(pickles)


def _check_pickle(pickled: bytes) -> None:
    found = _COSTLY.search(pickled)
    if found is not None:
        name = (found[1] or found[2]).decode()
        raise UnsafeModelFile(
            f"the state dict carries pickled code: it asks for {name}, which was not run; save only"
            " module.state_dict(), or use safetensors"
        )


def _unpickle(data: bytes) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of comes back as an error below
            loaded: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return loaded
    except pickle.UnpicklingError as error:
        asked = _GLOBAL.search(str(error))
        if asked is not None:
            raise UnsafeModelFile(
                f"the state dict carries pickled code: it asks for {asked[1] or asked[2]}, which was not run;"
                " save only module.state_dict(), or use safetensors"
            ) from None
        raise InvalidModelFile(
            f"the state dict cannot be unpickled safely ({one_line(error)}); save it again"
        ) from None
    except _LOAD_ERRORS as error:
        if is_out_of_memory(error) and asked_bytes(error) <= len(data):
            raise
        if "TorchScript" in str(error):
            raise UnsafeModelFile(
                "the file is a TorchScript program, not a state dict; save state_dict()"
            ) from None
        raise InvalidModelFile(f"the state dict is damaged ({one_line(error)}); save it again") from None


def _named_tensors(value: object) -> dict[str, torch.Tensor]:
    for _ in range(_MOST_WRAPPERS):
        entries = _entries(value)
        inner = next((entries[name] for name in _WRAPPERS if isinstance(entries.get(name), Mapping)), None)
        if inner is None:
            return _only_tensors(entries)
        value = inner
    raise InvalidModelFile("the file holds tables within tables; save module.state_dict() alone")


def _entries(value: object) -> dict[Any, Any]:
    """A table as a plain one: the methods of one from a pickle may be hidden by attributes of the same names."""
    if not isinstance(value, dict):
        raise InvalidModelFile(
            f"the file holds a {type(value).__name__}, not a state dict; save module.state_dict()"
        )
    return dict(dict.items(value))


def _only_tensors(entries: dict[Any, Any]) -> dict[str, torch.Tensor]:
    if not entries:
        raise InvalidModelFile("the state dict has no tensors; save module.state_dict()")
    for name, tensor in entries.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InvalidModelFile(
                f"entry {quoted(name)} is a {type(tensor).__name__}, not a tensor; save module.state_dict() alone"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InvalidModelFile(
                f"tensor {quoted(name)} is sparse, quantized or without data; save plain tensors of numbers"
            )
    return entries


def _check_sizes(tensors: dict[str, torch.Tensor], size_bytes: int) -> None:
    """Strides of 0 make a tensor of any size from one number, and whoever copies it pays for that."""
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > max(_ALWAYS_ALLOWED_BYTES, 2 * size_bytes):
            raise InvalidModelFile(
                f"tensor {quoted(name)} of shape {tuple(tensor.shape)} repeats a few numbers; save it contiguous"
            )
