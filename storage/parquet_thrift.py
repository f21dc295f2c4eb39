"""Thrift's compact protocol, as the headers of Parquet files are written in it, read without its library.

Protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, I32, I64, _DOUBLE, BINARY, _LIST, _SET, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12
REFUSED = 0
"""Of a field that must not be there."""
_MOST_ITEMS = 1_000_000  # of all needed lists: a hundred thousand columns of row groups have six each

# What is asked of a struct: its fields by number, each of a kind, a struct, or a list of one shape.
Shape = int | dict[int, "Shape"] | list["Shape"]


class PagesError(ValueError):
    """What is wrong with a Parquet file, in one line."""


class Compact:
    """Thrift's compact protocol. What is asked for must be there once and as asked: readers differ about the rest."""

    def __init__(self, data: bytes, position: int, end: int) -> None:
        self._data, self.position, self._end = data, position, end
        self._items = 0

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
        if kind in (_I16, I32, I64):
            return self._signed()
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == BINARY:
            return self._skip(self._unsigned())
        if kind in (_LIST, _SET):
            return self._list(depth - 1, shape[0] if isinstance(shape, list) else None)
        if kind == STRUCT:
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

    def needed(self, depth: int, shape: dict[int, Shape]) -> bytes:
        """A struct of the fields of `shape` alone, spelled so that there is one way to read it."""
        found: dict[int, bytes] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind, wanted = head & 0xF, shape.get(number)
            if wanted is None:
                self._value(kind, depth, None)
                continue
            if wanted == REFUSED:
                raise PagesError("it is encrypted; write it as it is")
            if number in found:
                raise PagesError(f"a header has its field {number} twice")
            found[number] = bytes([kind]) + _varint(number << 1) + self._needed(kind, depth, wanted)
        return b"".join(found.values()) + b"\0"

    def _needed(self, kind: int, depth: int, shape: Shape) -> bytes:
        start = self.position
        if isinstance(shape, int) or kind != _kind(shape) or not depth:
            self._value(kind, depth, shape)
            return self._data[start : self.position]
        if isinstance(shape, dict):
            return self.needed(depth - 1, shape)
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._unsigned()
        self._items += size
        if self._items > _MOST_ITEMS:
            raise PagesError(f"its footer lists {self._items} things or more")
        items = []
        for _ in range(size):
            if head & 0xF != _kind(shape[0]):
                raise PagesError(f"a header has items of kind {head & 0xF} where {_kind(shape[0])} belongs")
            items.append(self._needed(head & 0xF, depth - 1, shape[0]))
        return bytes([0xF0 | _kind(shape[0])]) + _varint(size) + b"".join(items)

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
    return shape if isinstance(shape, int) else STRUCT if isinstance(shape, dict) else _LIST


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
