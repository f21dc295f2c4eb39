"""Arrays of numbers, each in the coding that takes the fewest bytes; decoding large ones is as fast as memory allows.

Large arrays go through `pcodec` (Loncaric et al. 2025, arXiv 2502.06112), which interleaves table-driven ANS coders:
close to the entropy of the array, hundreds of millions of values a second and core. Few values, and many values of
which most are the same, go through the slower and closer models of `symbol_coding`, which share one stream.
Floats are cut into planes of bytes where that is smaller, so that exponents are coded and mantissas stored; of floats
that are mostly zero only the others are stored.

An array is written as a tag and what the tag says in a directory, and its bytes in the order of the directory.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import symbol_coding
from .bit_stream import BitReader, BitWriter
from .varints import ByteReader, varint

Array = NDArray[Any]

RAW, CONSTANT, PCO, SYMBOLS, PLANES, SPARSE = range(6)
MOST_SYMBOLS = 1 << 19  # entries of one array that go through the slow models
MOST_SYMBOLS_TOGETHER = 1 << 20  # of all arrays
_FEW = 4096  # entries for which no time matters
_WORTH = 50  # of bytes, the part that slow models must save with more entries
_PIECE = 1 << 22  # entries of one pcodec blob: blobs decode side by side
_PAGE = 1 << 20  # entries of one page, which has its own start in the blob
_LEVEL = 12
_MAP_SHARE = 16  # of the entries, the part that must be zero before the others are stored apart


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is known of an array before it is read: its shape, NumPy's dtype, and whether its bits are a float's."""

    shape: tuple[int, ...]
    dtype: str
    is_float: bool = False

    @property
    def count(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes when decoded."""
        return self.count * np.dtype(self.dtype).itemsize

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns: the first dimension, and the others together."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.count // max(1, rows)


@dataclass(frozen=True, kw_only=True)
class _Coded:
    """One way to write an array; `symbols` are the entries that went through the slow models into `writer`."""

    directory: bytes
    blobs: tuple[bytes, ...] = ()
    writer: BitWriter | None = None
    symbols: int = 0

    def size(self) -> int:
        """Bytes, those of the decisions rounded up."""
        decisions = -(-self.writer.cost() // (8 << 10)) if self.writer else 0
        return len(self.directory) + sum(map(len, self.blobs)) + decisions


class ArrayWriter:
    """Codes arrays one after the other."""

    def __init__(self) -> None:
        self._directory: list[bytes] = []
        self._blobs: list[bytes] = []
        self._decisions = BitWriter()
        self._left = MOST_SYMBOLS_TOGETHER

    def add(self, array: Array, *, is_float: bool) -> int:
        """Append an array; the bytes it takes. `is_float` says that its integers are the bits of floats."""
        coded = self._best(np.ascontiguousarray(array), is_float=is_float)
        self._directory.append(coded.directory)
        self._blobs += coded.blobs
        self._left -= coded.symbols
        if coded.writer:
            self._decisions.extend(coded.writer)
        return coded.size()

    def sections(self) -> tuple[bytes, bytes, list[bytes]]:
        """The directory, the decisions, and the arrays' own bytes."""
        return b"".join(self._directory), self._decisions.data(), self._blobs

    def _best(self, array: Array, *, is_float: bool, whole: bool = True, noisy: bool = False) -> _Coded:
        plain = _Coded(directory=bytes([RAW]), blobs=(array.tobytes(),))
        if not array.size:
            return plain
        bits = _bits(array)
        if (bits == bits.flat[0]).all():
            return _constant(array)
        found = [plain]
        if array.size > 16:
            found.append(_pco(array))
        if array.dtype == np.uint8 and not noisy:
            found += self._symbols(array, min(found, key=_Coded.size).size())
        elif is_float:
            found.append(self._planes(array))
            zeros = array.size - np.count_nonzero(bits)
            if whole and zeros * _MAP_SHARE >= array.size:
                found.append(self._sparse(array, bits))
        return min(found, key=_Coded.size)  # the first one of the smallest

    def _symbols(self, codes: Array, rival_bytes: int) -> list[_Coded]:
        if codes.size > min(MOST_SYMBOLS, self._left):
            return []
        if codes.size > _FEW and 2 * int(np.bincount(codes.ravel()).max()) < codes.size:
            return []  # nearly as many decisions as entries and more: slow, and little is saved
        header, writer = symbol_coding.encode(codes.reshape(_layout(codes).matrix))
        coded = _Coded(directory=bytes([SYMBOLS]) + header, writer=writer, symbols=codes.size)
        wins = codes.size <= _FEW or (rival_bytes - coded.size()) * _WORTH >= rival_bytes
        return [coded] if wins else []

    def _planes(self, array: Array) -> _Coded:
        exponents, *mantissas = _planes(_bits(array))
        planes = [self._best(exponents, is_float=False)]
        planes += [self._best(plane, is_float=False, noisy=True) for plane in mantissas]
        return _joined(bytes([PLANES]), planes)

    def _sparse(self, array: Array, bits: Array) -> _Coded:
        is_there = bits != 0
        parts = [
            self._best(is_there.astype(np.uint8), is_float=False),
            self._best(array[is_there], is_float=True, whole=False),
        ]
        return _joined(bytes([SPARSE]) + varint(int(is_there.sum())), parts)


class ArrayReader:
    """Gives arrays back in their order. What it is given may be wrong: ValueError says in which way.

    `read` reads the directory and decodes what is slow at once; the array itself is there when the returned function
    is called, large ones decoded meanwhile by the threads of `pool`.
    """

    def __init__(
        self, directory: bytes, decisions: bytes, blobs: memoryview, pool: ThreadPoolExecutor
    ) -> None:
        self._directory = ByteReader(directory)
        self._decisions = BitReader(decisions)
        self._blobs = blobs
        self._pool = pool
        self._left = MOST_SYMBOLS_TOGETHER

    def read(self, layout: Layout, *, whole: bool = True) -> Callable[[], Array]:
        """The next array, of this layout."""
        tag = self._directory.byte()
        if tag == RAW:
            data = self._take(layout.size_bytes)
            return lambda: np.frombuffer(data, layout.dtype).reshape(layout.shape)
        if tag == CONSTANT:
            return self._constant(layout)
        if tag == PCO:
            return self._pco(layout)
        if tag == SYMBOLS and layout.dtype == "<u1":
            return self._symbols(layout)
        if tag == PLANES and layout.is_float:
            return self._planes(layout)
        if tag == SPARSE and layout.is_float and whole:
            return self._sparse(layout)
        raise ValueError(f"coding {tag} is not one of an array of {layout.dtype}")

    def end(self) -> None:
        """ValueError unless everything was read."""
        if self._directory.left or len(self._blobs):
            raise ValueError("it has more bytes than its arrays")

    def _take(self, count: int) -> memoryview:
        if count > len(self._blobs):
            raise ValueError("it is cut short")
        taken, self._blobs = self._blobs[:count], self._blobs[count:]
        return taken

    def _constant(self, layout: Layout) -> Callable[[], Array]:
        item_bytes = np.dtype(layout.dtype).itemsize
        item = self._directory.take(self._directory.number(item_bytes)).ljust(item_bytes, b"\0")
        value = np.frombuffer(item, layout.dtype)
        return lambda: np.full(layout.shape, value[0])

    def _pco(self, layout: Layout) -> Callable[[], Array]:
        array = np.empty(layout.count, layout.dtype)
        waiting: list[Future[None]] = []
        for start in range(0, layout.count, _PIECE):
            piece = array[start : start + _PIECE]
            blob = self._take(self._directory.number(len(self._blobs)))
            waiting.append(self._pool.submit(_unpco, blob, _simple(piece)))

        def finish() -> Array:
            for piece in waiting:
                piece.result()
            return array.reshape(layout.shape)

        return finish

    def _symbols(self, layout: Layout) -> Callable[[], Array]:
        self._left -= layout.count
        if layout.count > MOST_SYMBOLS or self._left < 0:
            raise ValueError(f"{layout.count} codes are too many for the slow models")
        header = self._directory.take(symbol_coding.HEADER_BYTES)
        codes = symbol_coding.decode(self._decisions, header, layout.matrix).reshape(layout.shape)
        return lambda: codes

    def _planes(self, layout: Layout) -> Callable[[], Array]:
        item_bytes = np.dtype(layout.dtype).itemsize
        byte = Layout(shape=layout.shape, dtype="<u1")
        planes = [self.read(byte) for _ in range(item_bytes)]
        return lambda: _from_planes([plane() for plane in planes]).view(layout.dtype)

    def _sparse(self, layout: Layout) -> Callable[[], Array]:
        count = self._directory.number(layout.count)
        flags = self.read(Layout(shape=layout.shape, dtype="<u1"))
        values = self.read(Layout(shape=(count,), dtype=layout.dtype, is_float=True), whole=False)

        def finish() -> Array:
            is_there = flags() != 0
            if np.count_nonzero(is_there) != count:
                raise ValueError(f"{count} values do not fit its zeros")
            array = np.zeros(layout.shape, layout.dtype)
            array[is_there] = values()
            return array

        return finish


def _layout(array: Array) -> Layout:
    return Layout(shape=array.shape, dtype=array.dtype.str)


def _bits(array: Array) -> Array:
    return array.view(f"<u{array.dtype.itemsize}")


def _joined(head: bytes, parts: Sequence[_Coded]) -> _Coded:
    writer = BitWriter()
    for part in parts:
        if part.writer:
            writer.extend(part.writer)
    return _Coded(
        directory=head + b"".join(part.directory for part in parts),
        blobs=tuple(blob for part in parts for blob in part.blobs),
        writer=writer,
        symbols=sum(part.symbols for part in parts),
    )


def _constant(array: Array) -> _Coded:
    item = array.reshape(-1)[:1].tobytes().rstrip(b"\0")
    return _Coded(directory=bytes([CONSTANT]) + varint(len(item)) + item)


def _pco(array: Array) -> _Coded:
    flat = _simple(array.reshape(-1))
    blobs = tuple(
        _pcodec().simple_compress(flat[start : start + _PIECE], _config(flat.dtype == np.uint8))
        for start in range(0, len(flat), _PIECE)
    )
    return _Coded(directory=bytes([PCO]) + b"".join(varint(len(blob)) for blob in blobs), blobs=blobs)


def _unpco(blob: memoryview, piece: Array) -> None:
    try:
        progress = _pcodec().simple_decompress_into(bytes(blob), piece)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"pcodec cannot read it ({error})") from None
    if progress.n_processed != len(piece) or not progress.finished:
        raise ValueError(f"pcodec finds {progress.n_processed} of {len(piece)} numbers")


def _simple(array: Array) -> Array:
    """The same numbers in the machine's own byte order, as pcodec wants them."""
    return array.view(array.dtype.newbyteorder("="))


def _planes(bits: Array) -> list[Array]:
    """The bytes of floats, exponents first: the sign, which tells nothing, goes to the end of the mantissa."""
    turned = (bits << 1) | (bits >> (8 * bits.dtype.itemsize - 1))
    return [(turned >> 8 * place).astype(np.uint8) for place in range(bits.dtype.itemsize - 1, -1, -1)]


def _from_planes(planes: Sequence[Array]) -> Array:
    turned = np.zeros(planes[0].shape, f"<u{len(planes)}")
    for plane in planes:
        turned = (turned << 8) | plane
    return (turned >> 1) | (turned << (8 * len(planes) - 1))


@cache
def _pcodec() -> Any:
    from pcodec import standalone

    return standalone


@cache
def _config(is_code: bool) -> Any:
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec

    paging = PagingSpec.equal_pages_up_to(_PAGE)
    if not is_code:
        return ChunkConfig(compression_level=_LEVEL, paging_spec=paging, enable_8_bit=True)
    return ChunkConfig(
        compression_level=_LEVEL,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=paging,
        enable_8_bit=True,
    )
