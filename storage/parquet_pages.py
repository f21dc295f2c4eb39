"""What a Parquet file really holds, told by the headers of its pages: the numbers in its footer may lie.

Format: https://github.com/apache/parquet-format (README.md, parquet.thrift).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .parquet_thrift import BINARY, I32, I64, REFUSED, STRUCT, Compact, PagesError, Shape

_MAGIC = b"PAR1"
_LENGTH_BYTES = 4
_MOST_FOOTER_BYTES = 4 << 20  # a reader makes up to 200 times as much of it
_MOST_PAGES = 100_000
_MOST_NESTING = 16
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of page that hold values, and the fields of their headers
_FIELD_BY_KIND = {_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}

# By the numbers of parquet.thrift. What is asked of a page header, and of a footer:
_VALUES: dict[int, Shape] = {1: I32}
_PAGE_HEADER: dict[int, Shape] = {1: I32, 2: I32, 3: I32, **dict.fromkeys(_FIELD_BY_KIND.values(), _VALUES)}
_COLUMN: dict[int, Shape] = {3: {5: I64, 7: I64, 9: I64, 11: I64}}
_FOOTER: dict[int, Shape] = {3: I64, 4: [{1: [_COLUMN], 3: I64}]}
# And all that it takes to read one: no statistics, indexes, orders, notes of other programs.
_SCHEMA_ELEMENT: dict[int, Shape] = {4: BINARY, 10: STRUCT, **dict.fromkeys((1, 2, 3, 5, 6, 7, 8, 9), I32)}
_COLUMN_DATA: dict[int, Shape] = {
    1: I32,
    2: [I32],
    3: [BINARY],
    4: I32,
    **dict.fromkeys((5, 6, 7, 9, 11), I64),
}
_CHUNK: dict[int, Shape] = {1: BINARY, 2: I64, 3: _COLUMN_DATA, 8: REFUSED, 9: REFUSED}
_GROUP: dict[int, Shape] = {1: [_CHUNK], 2: I64, 3: I64}
_NEEDED: dict[int, Shape] = {
    1: I32,
    2: [_SCHEMA_ELEMENT],
    3: I64,
    4: [_GROUP],
    6: BINARY,
    8: REFUSED,
    9: REFUSED,
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a column: its values (entries of nested lists, empty cells included) and its unpacked bytes."""

    is_dictionary: bool
    values: int
    unpacked_bytes: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One column of a row group as the footer states it: its values, and where its pages lie."""

    values: int
    start: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A part of the rows as the footer states it."""

    rows: int
    chunks: tuple[Chunk, ...]


def footer_of(data: bytes) -> bytes:
    """The metadata at the end of a file. Raises PagesError."""
    if not data.startswith(_MAGIC) or not data.endswith(_MAGIC):
        raise PagesError("it does not begin and end with PAR1; it may be cut short, or encrypted")
    end = len(data) - len(_MAGIC) - _LENGTH_BYTES
    size_bytes = int.from_bytes(data[end : end + _LENGTH_BYTES], "little") if end > 0 else 0
    if not 0 < size_bytes <= end - len(_MAGIC):
        raise PagesError(f"it states a footer of {size_bytes} bytes in a file of {len(data)}")
    if size_bytes > _MOST_FOOTER_BYTES:
        raise PagesError(f"its footer has {size_bytes} bytes, more than {_MOST_FOOTER_BYTES}")
    return data[end - size_bytes : end]


def file_around(footer: bytes) -> bytes:
    """A file of nothing but this footer."""
    return _MAGIC + footer + len(footer).to_bytes(_LENGTH_BYTES, "little") + _MAGIC


def needed_of(footer: bytes) -> bytes:
    """The footer with what it takes to read the columns, and nothing else. Raises PagesError, also for encrypted files.

    Arrow (26.0.1) ends the process over statistics, and reads a list for what it should hold whatever it says: so Arrow
    is given nothing that was not understood here.
    """
    return Compact(footer, 0, len(footer)).needed(_MOST_NESTING, _NEEDED)


def row_groups(footer: bytes) -> list[RowGroup]:
    """The parts that a footer states, which add up to the rows that it states. Raises PagesError."""
    fields = Compact(footer, 0, len(footer)).struct(_MOST_NESTING, _FOOTER)
    groups = [
        RowGroup(
            rows=_count(group.get(3)), chunks=tuple(_chunk(column.get(3, {})) for column in group.get(1, ()))
        )
        for group in fields.get(4, ())
    ]
    rows = sum(group.rows for group in groups)
    if min((group.rows for group in groups), default=0) < 0 or rows != fields.get(3):
        raise PagesError(f"it states {fields.get(3)} rows, and its parts {rows}")
    return groups


def _chunk(column: dict[int, Any]) -> Chunk:
    values, size_bytes, start = (_count(column.get(field)) for field in (5, 7, 9))
    dictionary = column.get(11, 0)
    if min(values, size_bytes, start, dictionary) < 0:
        raise PagesError("a column states no valid number of values, bytes or place")
    return Chunk(values=values, start=min(dictionary or start, start), size_bytes=size_bytes)


def pages(data: bytes, start: int, size_bytes: int) -> Iterator[Page]:
    """The pages of one column chunk, which lies at byte `start`. Raises PagesError."""
    end = start + size_bytes
    if start < len(_MAGIC) or size_bytes < 0 or end > len(data):
        raise PagesError(f"a column lies at bytes {start} to {end} of a file of {len(data)}")
    count = 0
    while start < end:
        reader = Compact(data, start, end)
        header = reader.struct(_MOST_NESTING, _PAGE_HEADER)
        kind, unpacked, packed = (_count(header.get(field)) for field in (1, 2, 3))
        values = _count(header.get(_FIELD_BY_KIND.get(kind, 0), {}).get(1))
        if min(kind, unpacked, packed, values) < 0:
            raise PagesError(f"the page at byte {start} has no valid header")
        start, count = reader.position + packed, count + 1
        if start > end or count > _MOST_PAGES:
            raise PagesError(f"its pages end at byte {start}, beyond their column, or are too many")
        yield Page(is_dictionary=kind == _DICTIONARY, values=values, unpacked_bytes=unpacked)


def _count(field: object) -> int:
    """A field that must be a number and not negative; -1 if it is not."""
    return field if isinstance(field, int) else -1
