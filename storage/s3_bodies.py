"""Bodies of requests and replies, without the copies that the client would make of them."""

import io
from typing import IO, Protocol, cast

from .errors import StoreUnreachable
from .store import flat_view

# Stays in the processor's cache on its way through urllib3, which copies it once.
_RECEIVED_BYTES = 512 << 10
# The connect timeout holds for all of one send: 5 seconds for this much.
_SENT_BYTES = 256 << 10


class Body(Protocol):
    def read(self, amt: int | None = ..., /) -> bytes: ...

    def readinto(self, b: memoryview, /) -> int: ...

    def close(self) -> None: ...


class _Sent:
    """Bytes as the file that the client wants to send, handed over in views: `bytes` would be copied piece by piece."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def __len__(self) -> int:
        return len(self._data)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def read(self, _size: int = -1, /) -> memoryview:
        piece = self._data[self._position : self._position + _SENT_BYTES]
        self._position += len(piece)
        return piece


def fill(buffer: memoryview, body: Body, place: str) -> None:
    """The whole body, in pieces; the read past the end is what makes botocore compare length and checksum."""
    filled = 0
    while filled < len(buffer) and (count := body.readinto(buffer[filled : filled + _RECEIVED_BYTES])):
        filled += count
    if filled < len(buffer):
        raise StoreUnreachable(
            f"{place}: the connection broke after {filled} of {len(buffer)} bytes: try again"
        )
    if body.read(1):
        raise StoreUnreachable(f"{place}: the server sent more bytes than it announced")


def body_of(data: memoryview | bytes) -> IO[bytes]:
    return cast("IO[bytes]", _Sent(flat_view(data)))
