"""Round-to-nearest quantization as compiled code: what `quantization.affine` and `quantization.compressed_tensors` give
for rows of a matrix, bit for bit, in one pass over memory and without torch.

`quantize.c` is built when fleetpress is installed. Where there was no compiler the library is missing, `available()`
says so, and the torch code does the same work, several times slower.
"""

import ctypes
import functools
import importlib.machinery
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.treatment import INT, PACK

__all__ = ["QuantizedRows", "available", "quantize_rows", "supports"]

Bytes = NDArray[np.uint8] | memoryview | bytearray | bytes  # contiguous

_VERSION = 2  # of the functions' arguments, as in quantize.c
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_TORCH_NAMES = {"BF16": "torch.bfloat16", "F16": "torch.float16", "F32": "torch.float32"}
_LAYOUTS = (PACK, INT)  # in the order of quantize.c


@dataclass(frozen=True, kw_only=True)
class QuantizedRows:
    """Rows of a matrix in one of compressed-tensors' layouts, all arrays as uint8 [bytes].

    `packed` holds int32 [rows, ceil(columns * num_bits / 32)] (int-quantized: int8 [rows, columns]), `scale`
    [rows, groups] in the weights' dtype, `zero_point` (None if symmetric) int32 [ceil(rows * num_bits / 32), groups],
    packed along the rows (int-quantized: int8 [rows, groups]). `signal` and `noise` are the sums of the squares of the
    weights and of their errors: 10 * log10(signal / noise) is `sqnr_db`.
    """

    packed: NDArray[np.uint8]
    scale: NDArray[np.uint8]
    zero_point: NDArray[np.uint8] | None
    signal: float
    noise: float


def available() -> bool:
    """Whether the library was built and can be loaded. FLEETPRESS_NO_KERNELS=1 in the environment says no to it.

    Raises ImportError for a library of another version than this file: only a source tree can hold one.
    """
    return os.environ.get("FLEETPRESS_NO_KERNELS", "0") in ("", "0") and _library() is not None


def supports(dtype: str, scheme: QuantScheme, shape: tuple[int, ...]) -> bool:
    """Whether `quantize_rows` can do this here: `available()`, a matrix, safetensors' dtype BF16, F16 or F32, integers,
    one scale per channel or per group, groups that divide a row.
    """
    return available() and _knows(dtype, scheme, shape)


def quantize_rows(
    rows: Bytes, dtype: str, shape: tuple[int, int], scheme: QuantScheme, *, layout: str = PACK
) -> QuantizedRows:
    """The bytes of a matrix of `shape`, or of a block of its rows, quantized; `layout` is pack- or int-quantized.

    All blocks of a matrix but the last need a multiple of 32 rows, or their packed zero points do not join up.
    Raises QuantizationError for NaN, infinite or overflowing weights and for rows that do not have the shape's bytes,
    MethodError for what there is no kernel for, RuntimeError without the library.
    """
    if layout not in _LAYOUTS:
        raise MethodError(f"layout is {layout!r}; the kernel writes {PACK} and {INT}")
    if not _knows(dtype, scheme, shape):
        raise MethodError(f"no kernel for {dtype} weights of shape {shape} and {scheme}; use the torch code")
    library = _library() if available() else None
    if library is None:
        raise RuntimeError(
            "the compiled kernel is missing; ask `available()`, and use the torch code without it"
        )
    weights: NDArray[np.uint8] = np.frombuffer(rows, np.uint8)
    count, columns = shape
    item, groups = _ITEM_BYTES[dtype], scheme.groups(count, columns)[1]
    if weights.size != count * columns * item:
        raise QuantizationError(
            f"rows have {weights.size} bytes where the shape needs {count * columns * item}"
        )
    packed = np.empty(count * _code_bytes(columns, scheme, layout), np.uint8)
    scale = np.empty(count * groups * item, np.uint8)
    zero_point = None if scheme.symmetric else np.empty(_code_bytes(count, scheme, layout) * groups, np.uint8)
    totals = np.empty(2, np.float64)
    bad = library[f"fleetpress_quantize_{dtype.lower()}"](
        _pointer(weights),
        ctypes.c_int64(count),
        ctypes.c_int64(columns),
        ctypes.c_int64(columns // groups),
        ctypes.c_int(scheme.num_bits),
        ctypes.c_int(scheme.symmetric),
        ctypes.c_int(_LAYOUTS.index(layout)),
        _pointer(packed),
        _pointer(scale),
        _pointer(zero_point),
        _pointer(totals),
    )
    if bad:
        raise QuantizationError(_bad_values(weights, dtype))
    signal, noise = totals.tolist()
    return QuantizedRows(packed=packed, scale=scale, zero_point=zero_point, signal=signal, noise=noise)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library beside this file; setuptools names it as it names Python's own extension modules."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = os.path.join(os.path.dirname(__file__), "_quantize" + suffix)
        if os.path.exists(path):
            break
    else:
        return None
    try:
        library = ctypes.CDLL(path)
    except OSError:  # built for another system
        return None
    found = ctypes.c_int32.in_dll(library, "fleetpress_kernels_version").value
    if found != _VERSION:
        raise ImportError(
            f"{path} has version {found}, wanted is {_VERSION}; install fleetpress again", path=path
        )
    return library


def _knows(dtype: str, scheme: QuantScheme, shape: tuple[int, ...]) -> bool:
    if len(shape) != 2 or min(shape) < 1 or dtype not in _ITEM_BYTES:
        return False
    if scheme.type != "int" or scheme.strategy == "tensor":
        return False
    return shape[1] % (scheme.group_size or shape[1]) == 0


def _code_bytes(count: int, scheme: QuantScheme, layout: str) -> int:
    return count if layout == INT else -(-count * scheme.num_bits // 32) * 4


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def _bad_values(weights: NDArray[np.uint8], dtype: str) -> str:
    """The words of `affine` for the same weights."""
    if dtype == "BF16":
        values = (weights.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = weights.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)
    for value, words in ((np.isnan(values), "NaN"), (np.isinf(values), "infinite")):
        if count := int(value.sum()):
            return (
                f"{count} of {values.size} weights are {words}; repair the model or add the layer to `ignore`"
            )
    return f"weights up to {float(np.abs(values).max()):.3g} overflow {_TORCH_NAMES[dtype]}; add the layer to `ignore`"
