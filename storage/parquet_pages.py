"""What a Parquet file really holds, told by the headers of its pages: the numbers in its footer may lie.

Format: https://github.com/apache/parquet-format (README.md, parquet.thrift), headers in Thrift's compact protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAGIC = b"PAR1"
_LENGTH_BYTES = 4
_MOST_FOOTER_BYTES = 4 << 20  # a reader makes up to 200 times as much of it
_MOST_PAGES = 100_000
_MOST_NESTING = 16
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of page that hold values, and the fields of their headers
_FIELD_BY_KIND = {_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    12,
)

# What is read of a struct: its fields by number, each an integer of that kind, a struct, or a list of one shape.
Shape = int | dict[int, "Shape"] | list["Shape"]
_VALUES: dict[int, Shape] = {1: _I32}
_PAGE_HEADER: dict[int, Shape] = {
    1: _I32,
    2: _I32,
    3: _I32,
    **dict.fromkeys(_FIELD_BY_KIND.values(), _VALUES),
}
_COLUMN: dict[int, Shape] = {3: {5: _I64, 7: _I64, 9: _I64, 11: _I64}}
_FOOTER: dict[int, Shape] = {3: _I64, 4: [{1: [_COLUMN], 3: _I64}]}


class PagesError(ValueError):
    """What is wrong with a Parquet file, in one line."""


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


def row_groups(footer: bytes) -> list[RowGroup]:
    """The parts that a footer states, which add up to the rows that it states. Raises PagesError.

    pyarrow's own view of them (26.0.1) ends the process where Arrow finds a fault in the statistics of a column.
    """
    fields = _Compact(footer, 0, len(footer)).struct(_MOST_NESTING, _FOOTER)
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
        reader = _Compact(data, start, end)
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


class _Compact:
    """Thrift's compact protocol. What is asked for must be there once and as asked: readers differ about the rest."""

    def __init__(self, data: bytes, position: int, end: int) -> None:
        self._data, self.position, self._end = data, position, end

    def struct(self, depth: int, shape: dict[int, Shape]) -> dict[int, Any]:
        """The fields of `shape` by number; what else there is is passed over."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            value = self._value(head & 0xF, depth, shape.get(number))
            if number in fields:
                raise PagesError(f"a header has its field {number} twice")
            if number in shape:
                fields[number] = value
        return fields

    def _value(self, kind: int, depth: int, shape: Shape | None) -> Any:  # noqa: PLR0911 - one for every kind
        if not depth:
            raise PagesError("a header is nested too deeply")
        if shape is not None and kind != _kind(shape):
            raise PagesError(f"a header has a field of kind {kind} where one of kind {_kind(shape)} belongs")
        if kind in (_TRUE, _FALSE):
            return None
        if kind == _BYTE:
            return self._skip(1)
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._unsigned())
        if kind in (_LIST, _SET):
            return self._list(depth - 1, shape[0] if isinstance(shape, list) else None)
        if kind == _STRUCT:
            return self.struct(depth - 1, shape if isinstance(shape, dict) else {})
        raise PagesError("a header has a field that none of its kind has")  # maps: the format has none

    def _list(self, depth: int, shape: Shape | None) -> list[Any]:
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._unsigned()
        kind = head & 0xF
        if size > self._end - self.position:  # an item has a byte at least
            raise PagesError("a header has a list that is longer than its place")
        found = []
        for _ in range(size):
            if shape is not None:
                found.append(self._value(kind, depth, shape))
            elif kind in (_TRUE, _FALSE):  # as items they have a byte of their own
                self._skip(1)
            else:
                self._value(kind, depth, None)
        return found

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.position - 1]

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > self._end:
            raise PagesError("a header is cut short")

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise PagesError("a header has a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)


def _kind(shape: Shape) -> int:
    return shape if isinstance(shape, int) else _STRUCT if isinstance(shape, dict) else _LIST
