"""Codes of a few values in a matrix, coded decision by decision with a model fitted to the matrix.

First which entries are the commonest code, block by block along the rows: the density of the entry's column and row
and its neighbours in the rows before tell much of it (a pruned layer has dead columns and busy rows). Then, of the
others, on which side of it they lie and how far. This is the binarization of DeepCABAC (Wiedemann et al. 2020, arXiv
1907.11900, the coder of MPEG's neural network standard), in contexts of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import symbol_kernel
from .bit_stream import ONE, BitReader, BitStream, BitWriter, Integers
from .mixing import MixedBits

Codes = NDArray[np.uint8]

HEADER_BYTES = 5
_BLOCK = 64  # entries that are coded at once
_FIRST_BLOCK = 16  # of the first row: nothing is known yet
_OTHERS_BLOCK, _LARGEST_OTHERS_BLOCK = 16, 2048
_STEPS = 14  # distances that are told step by step; larger ones as a byte
_NEIGHBOURS = 2 * 3 * 3  # contexts of what lies around an entry in the two rows before
_ABOVE = 64  # contexts of the distances in the row before


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """What is known of a matrix before its codes: the commonest one, the largest distance from it, shares, the order.

    `others` / 65536 is the share of other codes, `above` / 256 of larger ones among these. `by_columns`: the matrix is
    coded along its columns; `alike`: no place is taken to differ from another.
    """

    commonest: int
    furthest: int
    others: int
    above: int
    by_columns: bool = False
    alike: bool = False

    def header(self) -> bytes:
        """Five bytes. The share of larger codes leaves two bits to the order of coding."""
        shares = self.others.to_bytes(2, "little")
        return bytes(
            [self.commonest, self.furthest, *shares, self.above & 252 | self.alike << 1 | self.by_columns]
        )

    @staticmethod
    def from_header(data: bytes) -> "Symbols":
        """ValueError if no writer gives such a header."""
        commonest, furthest, low, high, last = data
        others = low | high << 8
        if not others:
            raise ValueError("a matrix of one code has no need of a model")
        return Symbols(
            commonest=commonest,
            furthest=furthest,
            others=others,
            above=last & 252,
            by_columns=bool(last & 1),
            alike=bool(last & 2),
        )


def encode(codes: Codes) -> tuple[bytes, BitWriter]:
    """The header and the decisions of a matrix [rows, columns] of at least two different codes.

    The model that takes least is given, the simplest one among equals.
    """
    counts = np.bincount(codes.ravel(), minlength=256)
    commonest = int(counts.argmax())
    others = int(codes.size - counts[commonest])
    above = int(counts[commonest + 1 :].sum())
    values = codes.astype(np.int64)
    best: tuple[int, bytes, BitWriter] | None = None
    for alike, by_columns in ((True, False), (False, False), (False, True)):
        symbols = Symbols(
            commonest=commonest,
            furthest=int(abs(values - commonest).max()),
            others=min(ONE - 1, max(1, others * ONE // codes.size)),
            above=min(252, above * 256 // others),
            by_columns=by_columns,
            alike=alike,
        )
        symbols = Symbols.from_header(symbols.header())
        writer = BitWriter()
        if symbol_kernel.available():
            turned = codes.T if by_columns else codes
            writer.code(*symbol_kernel.written_symbols(turned, _shares(symbols)))
        else:
            _code(writer, symbols, codes.shape, values)
        cost = writer.cost()
        if best is None or cost < best[0]:
            best = cost, symbols.header(), writer
    assert best is not None
    return best[1], best[2]


def decode(stream: BitStream, header: bytes, shape: tuple[int, int]) -> Codes:
    """The matrix again. ValueError for a header that no writer gives, and for codes above 255."""
    symbols = Symbols.from_header(header)
    if isinstance(stream, BitReader) and symbol_kernel.available():
        turned = shape[::-1] if symbols.by_columns else shape
        read = symbol_kernel.read_symbols(stream.words, stream.place, turned, _shares(symbols))
        return np.ascontiguousarray(read.T if symbols.by_columns else read)
    values = _code(stream, symbols, shape, None)
    if values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError("a code is no byte")
    return np.ascontiguousarray(values, np.uint8)


def _shares(symbols: Symbols) -> symbol_kernel.Shares:
    return symbols.commonest, symbols.furthest, symbols.others, symbols.above, symbols.alike


def _code(stream: BitStream, symbols: Symbols, shape: tuple[int, ...], values: Integers | None) -> Integers:
    """Drive a writer with `values`, or a reader without; the values."""
    if symbols.by_columns:
        turned = _code_rows(stream, symbols, shape[::-1], None if values is None else values.T)
        return turned.T
    return _code_rows(stream, symbols, shape, values)


def _code_rows(
    stream: BitStream, symbols: Symbols, shape: tuple[int, ...], values: Integers | None
) -> Integers:
    is_other = _code_map(stream, symbols, shape, None if values is None else values != symbols.commonest)
    rows, columns = np.nonzero(is_other)
    given = None if values is None else values[rows, columns] - symbols.commonest
    result = np.full(shape, symbols.commonest, np.int64)
    result[rows, columns] += _code_others(stream, symbols, shape, (rows, columns), given)
    return result


def _code_map(
    stream: BitStream, symbols: Symbols, shape: tuple[int, ...], given: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Which entries are not the commonest code."""
    if symbols.alike:
        found = np.zeros(math.prod(shape), np.int64)
        chances = MixedBits((1,), symbols.others, strength=4)
        for at in _blocks(found.size, _OTHERS_BLOCK, _LARGEST_OTHERS_BLOCK):
            bits = None if given is None else given.reshape(-1)[at].astype(np.int64)
            found[at] = chances.code(stream, (np.zeros_like(found[at]),), bits)
        return np.equal(found.reshape(shape), 1)
    rows, columns = shape
    chances = MixedBits((columns, rows, _NEIGHBOURS), symbols.others, strength=4)
    known = np.zeros(
        (rows + 2, columns + 4), np.int64
    )  # two rows of nothing before the first, two columns beside
    places = np.arange(columns)
    for row in range(rows):
        last, one = known[row], known[row + 1]
        beside = np.minimum(one[1:-3] + one[3:-1], 2)
        further = np.minimum(last[2:-2] + one[:-4] + one[4:], 2)
        neighbours = one[2:-2] + 2 * beside + 6 * further
        for at in _blocks(columns, _BLOCK if row else _FIRST_BLOCK, _BLOCK):
            around = places[at], np.full_like(places[at], row), neighbours[at]
            bits = None if given is None else given[row, at].astype(np.int64)
            known[row + 2, 2:-2][at] = chances.code(stream, around, bits)
    return np.equal(known[2:, 2:-2], 1)


def _blocks(count: int, first: int, largest: int) -> Iterator[slice]:
    """Runs of growing length that cover `count` entries."""
    start, size = 0, first
    while start < count:
        yield slice(start, min(count, start + size))
        start += size
        size = min(largest, 2 * size)


def _code_others(
    stream: BitStream,
    symbols: Symbols,
    shape: tuple[int, ...],
    places: tuple[Integers, Integers],
    given: Integers | None,
) -> Integers:
    """How far the codes at `places` lie from the commonest one, in the order of the places; below it is negative."""
    rows, columns = places
    tables = (1,) if symbols.alike else (1, shape[0], shape[1])
    signs = MixedBits(tables, symbols.above * 256 + 128, strength=8)
    tables = (1,) if symbols.alike else (shape[1], shape[0], _ABOVE)
    steps = [MixedBits(tables, ONE // 2, strength=2) for _ in range(1, min(symbols.furthest, _STEPS))]
    far = MixedBits((256,), ONE // 2, strength=1)
    found = np.zeros((shape[0] + 1, shape[1] + 2), np.int64)  # distances; a row of nothing before the first
    result = np.zeros(len(rows), np.int64)
    for at in _blocks(len(rows), _OTHERS_BLOCK, _LARGEST_OTHERS_BLOCK):
        row, column = rows[at], columns[at]
        nothing = np.zeros_like(row)
        above = 2 * found[row, column + 1] + found[row, column] + found[row, column + 2]
        around = (nothing,) if symbols.alike else (column, row, np.minimum(above, _ABOVE - 1))
        wanted = None if given is None else given[at]
        left = None if wanted is None else abs(wanted)
        sides = None if wanted is None else (wanted > 0).astype(np.int64)
        sign = signs.code(stream, (nothing,) if symbols.alike else (nothing, row, column), sides)
        distance, going = np.ones_like(row), np.arange(len(row))
        for number, step in enumerate(steps, start=1):
            more = None if left is None else (left[going] > number).astype(np.int64)
            going = going[step.code(stream, tuple(of[going] for of in around), more) == 1]
            distance[going] += 1
        if symbols.furthest > _STEPS and going.size:
            rest = None if left is None else left[going] - _STEPS
            distance[going] += _code_bytes(stream, far, rest, going.size)
        found[row + 1, column + 1] = distance
        result[at] = np.where(sign == 1, distance, -distance)
    return result


def _code_bytes(stream: BitStream, far: MixedBits, given: Integers | None, count: int) -> Integers:
    """Numbers below 256, bit by bit from the highest, each in the context of those before it."""
    node = np.ones(count, np.int64)
    for place in range(7, -1, -1):
        bit = far.code(stream, (node,), None if given is None else given >> place & 1)
        node = 2 * node + bit
    return node - 256
