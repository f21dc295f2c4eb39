"""The models of `symbol_coding` as compiled code: the same decisions under the same chances, some ten times as fast.

`symbol_kernel.c` is built when fleetpress is installed. Where there was no compiler the library is missing,
`available()` says so, and NumPy does the work.
"""

import ctypes
import functools
import importlib.machinery
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .mixing import log_odds, logistic

__all__ = ["available", "read_symbols", "written_symbols"]

_VERSION = 1  # of the function's arguments, as in symbol_kernel.c
_STEPS = 14  # as there, and in symbol_coding.py
_NO_MEMORY, _NO_BYTE = -1, -2

# Of a stream: its state and its words left, one number each.
Place = tuple[NDArray[np.uint64], NDArray[np.int64]]
# Commonest code, largest distance, shares of others and larger ones, alike.
Shares = tuple[int, int, int, int, bool]


def available() -> bool:
    """Whether the library was built and can be loaded. FLEETPRESS_NO_KERNELS=1 in the environment says no to it.

    Raises ImportError for a library of another version than this file: only a source tree can hold one.
    """
    return os.environ.get("FLEETPRESS_NO_KERNELS", "0") in ("", "0") and _library() is not None


def read_symbols(
    words: NDArray[np.uint32], place: Place, shape: tuple[int, int], shares: Shares
) -> NDArray[np.uint8]:
    """The next matrix of a stream: its words, and as arrays of one number the state and the words that are left.

    `place` goes on. Raises ValueError for codes above 255, MemoryError.
    """
    codes = np.empty(shape, np.uint8)
    _call(codes, shares, words=words, place=place)
    return codes


def written_symbols(codes: NDArray[np.uint8], shares: Shares) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chances in 1/65536 and decisions of a matrix, in the order in which they are coded. Raises MemoryError."""
    commonest, furthest, *_ = shares
    distance = np.abs(codes.astype(np.int16) - commonest)
    others = distance[distance > 0]
    steps = min(furthest, _STEPS) - 1
    room = (
        codes.size
        + others.size
        + int(np.minimum(others, max(steps, 0)).sum())
        + 8 * int((others >= _STEPS).sum())
    )
    chances, bits = np.empty(room, np.uint16), np.empty(room, np.uint8)
    place = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    given = np.array(codes, order="C")
    count = _call(given, shares, words=np.zeros(1, np.uint32), place=place, chances=chances, bits=bits)
    return chances[:count].astype(np.int64), bits[:count].astype(np.int64)


def _call(
    codes: NDArray[np.uint8],
    shares: Shares,
    *,
    words: NDArray[np.uint32],
    place: Place,
    chances: NDArray[np.uint16] | None = None,
    bits: NDArray[np.uint8] | None = None,
) -> int:
    library = _library()
    assert library is not None, "ask `available()`"
    work = library.fleetpress_code_symbols
    work.restype = ctypes.c_int64
    state, left = place
    count = work(
        *(_pointer(array) for array in (log_odds(), logistic(), state, words, left)),
        *map(ctypes.c_int64, (*codes.shape, *shares[:-1])),
        ctypes.c_int(shares[-1]),
        *(_pointer(array) for array in (codes, chances, bits)),
    )
    if count == _NO_MEMORY:
        raise MemoryError(f"no memory for the models of {codes.size} codes")
    if count == _NO_BYTE:
        raise ValueError("a code is no byte")
    return int(count)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library beside this file; setuptools names it as it names Python's own extension modules."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = os.path.join(os.path.dirname(__file__), "_symbols" + suffix)
        if os.path.exists(path):
            break
    else:
        return None
    try:
        library = ctypes.CDLL(path)
    except OSError:  # built for another system
        return None
    found = ctypes.c_int32.in_dll(library, "fleetpress_symbols_version").value
    if found != _VERSION:
        raise ImportError(
            f"{path} has version {found}, wanted is {_VERSION}; install fleetpress again", path=path
        )
    return library


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
