"""State dicts (`.pt`, `.pth`, `.bin`, `.safetensors`) to tensors, without running what they may carry."""

import io
import pickle
import re
import warnings
from collections.abc import Mapping

import torch

from .errors import InvalidModelFile, UnsafeModelFile
from .safetensors_header import header_of
from .tensors import tensor_from_bytes

_WRAPPERS = ("state_dict", "model_state_dict", "model")
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
    return _named_tensors(_unpickle(data))


def _is_safetensors(data: bytes) -> bool:
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data)


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
            f"the state dict cannot be unpickled safely ({_line(error)}); save it again"
        ) from None
    except _LOAD_ERRORS as error:
        if "TorchScript" in str(error):
            raise UnsafeModelFile(
                "the file is a TorchScript program, not a state dict; save state_dict()"
            ) from None
        raise InvalidModelFile(f"the state dict is damaged ({_line(error)}); save it again") from None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _named_tensors(value: object) -> dict[str, torch.Tensor]:
    if not isinstance(value, Mapping):
        raise InvalidModelFile(
            f"the file holds a {type(value).__name__}, not a state dict; save module.state_dict()"
        )
    for wrapper in _WRAPPERS:
        if isinstance(value.get(wrapper), Mapping):
            return _named_tensors(value[wrapper])
    if not value:
        raise InvalidModelFile("the state dict has no tensors; save module.state_dict()")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InvalidModelFile(
                f"entry {name!r} is a {type(tensor).__name__}, not a tensor; save module.state_dict() alone"
            )
    return dict(value)
