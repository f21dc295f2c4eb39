"""Whole numbers in as few bytes as they need, and bytes read in order: seven bits a byte, lowest first (LEB128)."""


def varint(number: int) -> bytes:
    """The bytes of a number that is not negative."""
    found = bytearray()
    while number >> 7:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


class ByteReader:
    """Takes bytes from the front; ValueError where there are too few, or a number is too large."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    @property
    def left(self) -> int:
        """Bytes that were not taken."""
        return len(self._data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        return bytes(self.view(count))

    def view(self, count: int) -> memoryview:
        """The next `count` bytes, not copied."""
        if count > len(self._data):
            raise ValueError("it is cut short")
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def number(self, most: int) -> int:
        """The next number, at most `most`."""
        found = place = 0
        while True:
            byte = self.byte()
            found |= (byte & 127) << place
            place += 7
            if found > most or place > 70:
                raise ValueError(f"the number {found} is above {most}")
            if byte < 128:
                return found
