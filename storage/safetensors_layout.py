"""The bytes of a `.safetensors` file before there is any tensor: its header, and where every tensor will lie."""

import json
import math
from collections.abc import Sequence

from .safetensors_header import BITS_BY_DTYPE, LENGTH_BYTES

_ALIGNED_BYTES = 8  # the data start at a multiple, as the library's own files do
_METADATA = {"format": "pt"}  # what transformers looks for


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * BITS_BY_DTYPE[dtype] // 8


def header_of_file(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> tuple[bytes, list[int], int]:
    """Header, offsets in the file and size of the file that holds tensors (name, dtype, shape) in this order."""
    entries: dict[str, object] = {"__metadata__": _METADATA}
    starts, end = [], 0
    for name, dtype, shape in tensors:
        starts.append(end)
        end += size_of(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[-1], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % _ALIGNED_BYTES)
    header = framed(text.decode())
    return header, [len(header) + start for start in starts], len(header) + end


def framed(header: str) -> bytes:
    """A header's text with its length in front, as a file begins."""
    text = header.encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
