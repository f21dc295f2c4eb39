"""Faults between a client and an S3 server: an HTTP/1.1 relay on loopback that breaks what its rules name.

    with FaultRelay("http://127.0.0.1:8333") as relay:
        relay.rules = [Rule(name="lost reply", method="PUT", target="partNumber=", fault=Reset(after=True))]

Requests go on as they came, `Host` too, so signatures hold; only `Expect: 100-continue` is answered here and dropped.
The first rule that fits a request decides what happens to it. Every rule counts its hits.
"""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol
from urllib.parse import urlsplit

_HOST = "127.0.0.1"
_BUFFER_BYTES = 1 << 20
_PATIENCE_SECONDS = 90.0  # for a client that is to hang up
_EXPECT = re.compile(rb"(?im)^expect:[ \t]*100-continue[ \t]*\r\n")
_CHUNKED = re.compile(rb"(?im)^transfer-encoding:[^\r\n]*\bchunked\b[^\r\n]*\r\n")
_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d+)")
_RANGE = re.compile(rb"(?im)^(content-range:[ \t]*bytes \d+-)(\d+)/")
_CLOSE = re.compile(rb"(?im)^connection:[ \t]*close\b|\A[^\r\n]*HTTP/1\.0\b")
_HUNG_UP = (OSError, asyncio.IncompleteReadError)


@dataclass(frozen=True)
class Answer:
    """What the server said; the body is without chunks, whatever framing it came in."""

    head: bytes
    body: bytes


class Exchange:
    """One request of a client, and what a fault may do with it."""

    def __init__(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: tuple[str, int],
    ) -> None:
        self.head = _EXPECT.sub(b"", head)
        self.method = head.partition(b" ")[0].decode("ascii", "replace")
        self.target = head.split(b" ", 2)[1].decode("ascii", "replace")
        self._expects = self.head != head
        self._reader, self._writer, self._server = reader, writer, server
        self.is_over = bool(_CLOSE.search(head))

    async def request(self, most: int | None = None) -> bytes:
        """The request's body, or its first bytes only."""
        if self._expects:
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects = False
        return await _body(self.head, self._reader, most)

    async def answer(self) -> Answer:
        """What the server says to the request."""
        body = await self.request()
        head = _CHUNKED.sub(b"Content-Length: %d\r\n" % len(body), self.head)
        reader, writer = await asyncio.open_connection(*self._server, limit=_BUFFER_BYTES)
        try:
            writer.write(head)
            writer.write(body)
            head = await reader.readuntil(b"\r\n\r\n")
            while head.split(b" ", 2)[1].startswith(b"1"):
                head = await reader.readuntil(b"\r\n\r\n")
            body = b"" if self.method == "HEAD" else await _body(head, reader)
        finally:
            writer.close()
        return Answer(_CHUNKED.sub(b"Content-Length: %d\r\n" % len(body), head), body)

    async def reply(self, answer: Answer, most: int | None = None) -> None:
        """Send an answer on, or its head and the first bytes of its body."""
        self._writer.write(answer.head)
        self._writer.write(answer.body[:most])
        await self._writer.drain()
        self.is_over = self.is_over or most is not None or bool(_CLOSE.search(answer.head))

    def reset(self) -> None:
        """End the connection with a RST."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        self.is_over = True

    async def until_client_leaves(self) -> None:
        """Say nothing more."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reader.read(), _PATIENCE_SECONDS)
        self.is_over = True


async def _body(head: bytes, reader: asyncio.StreamReader, most: int | None = None) -> bytes:
    if not _CHUNKED.search(head):
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        return await reader.readexactly(size if most is None else min(most, size))
    found = bytearray()
    while size := int((await reader.readline()).partition(b";")[0], 16):
        found += await reader.readexactly(size)
        await reader.readline()
    while (await reader.readline()).strip():
        pass
    return bytes(found)


class Fault(Protocol):
    """What happens to a request."""

    async def strike(self, exchange: Exchange) -> None:
        """Answer the client in the place of the server, or not at all."""
        ...


@dataclass(frozen=True)
class Refuse:
    """An S3 error that the server never meant; with status 200 it hides in the body, as S3 does it after a while."""

    status: int
    code: str
    message: str = "of the relay"

    async def strike(self, exchange: Exchange) -> None:
        """The request does not reach the server."""
        await exchange.request()
        said = f"<Code>{self.code}</Code><Message>{self.message}</Message>"
        body = f"<?xml version='1.0'?><Error>{said}</Error>".encode()
        head = b"HTTP/1.1 %d Fault\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
        shown = b"" if exchange.method == "HEAD" else body
        await exchange.reply(Answer(head % (self.status, len(body)), shown))


@dataclass(frozen=True)
class Reset:
    """A RST instead of a reply: before the server heard of the request, or after it did what was asked."""

    after: bool = False

    async def strike(self, exchange: Exchange) -> None:
        """No byte of a reply arrives."""
        await (exchange.answer() if self.after else exchange.request())
        exchange.reset()


@dataclass(frozen=True)
class Truncate:
    """Half of the body: then the end, a RST, or nothing at all; or its length told as if that were all.

    `length` rewrites Content-Length, `range` Content-Range as well.
    """

    how: Literal["close", "reset", "stall", "length", "range"]

    async def strike(self, exchange: Exchange) -> None:
        """The first half is right."""
        answer = await exchange.answer()
        half = len(answer.body) // 2
        if self.how in ("length", "range"):
            await exchange.reply(Answer(self._shortened(answer, half), answer.body[:half]))
            return
        await exchange.reply(answer, half)
        if self.how == "reset":
            exchange.reset()
        elif self.how == "stall":
            await exchange.until_client_leaves()

    def _shortened(self, answer: Answer, size: int) -> bytes:
        head = _LENGTH.sub(b"Content-Length: %d" % size, answer.head)
        if self.how == "length":
            return head
        cut = len(answer.body) - size
        return _RANGE.sub(lambda found: found[1] + b"%d/" % (int(found[2]) - cut), head)


@dataclass(frozen=True)
class Flip:
    """One bit of the body is another one: the lowest of the byte at `offset` (negative: from the end) or at `after`."""

    offset: int = 0
    after: bytes = b""

    async def strike(self, exchange: Exchange) -> None:
        """Length and headers are right."""
        answer = await exchange.answer()
        body = bytearray(answer.body)
        start = body.index(self.after) + len(self.after) if self.after else 0
        body[start + self.offset] ^= 1
        await exchange.reply(Answer(answer.head, bytes(body)))


@dataclass(frozen=True)
class Delay:
    """The reply comes late."""

    seconds: float

    async def strike(self, exchange: Exchange) -> None:
        """Otherwise all is well."""
        await asyncio.sleep(self.seconds)
        await exchange.reply(await exchange.answer())


@dataclass(frozen=True)
class CutUpload:
    """The connection ends while the client still sends: after `bytes` of its body."""

    bytes: int

    async def strike(self, exchange: Exchange) -> None:
        """The server hears nothing of it."""
        await exchange.request(self.bytes)
        exchange.reset()


@dataclass(kw_only=True)
class Rule:
    """Which requests a fault strikes: method, path with query, and head must match the patterns.

    Of those that fit, the first `skip` pass, then every `every`-th is struck, `times` in all (0: without end).
    """

    name: str
    fault: Fault
    method: str = ".*"
    target: str = ""
    head: str = ""
    skip: int = 0
    every: int = 1
    times: int = 1
    hits: int = field(default=0, init=False)
    _seen: int = field(default=0, init=False)

    def strikes(self, exchange: Exchange) -> bool:
        """Whether the fault happens now; counts."""
        fits = (
            re.fullmatch(self.method, exchange.method)
            and re.search(self.target, exchange.target)
            and re.search(self.head, exchange.head.decode("latin-1"), re.IGNORECASE)
        )
        if not fits or (self.times and self.hits >= self.times):
            return False
        self._seen += 1
        strikes = self._seen > self.skip and (self._seen - self.skip - 1) % self.every == 0
        self.hits += strikes
        return strikes


class FaultRelay:
    """The relay to `server` (http://host:port), from entering to leaving the context, in a thread of its own."""

    def __init__(self, server: str) -> None:
        place = urlsplit(server)
        assert place.hostname, server
        self._server = (place.hostname, place.port or 80)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._running: set[asyncio.Task[None]] = set()
        self.rules: Sequence[Rule] = ()
        self.requests = 0
        self.endpoint = ""

    def __enter__(self) -> "FaultRelay":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._serve, _HOST, 0, limit=_BUFFER_BYTES)
        port = self._listener.sockets[0].getsockname()[1]
        self.endpoint = f"http://{_HOST}:{port}"

    async def _end(self) -> None:
        self._listener.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Every request of one client until a side hangs up."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except _HUNG_UP:
            pass
        finally:
            writer.close()
            self._running.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        exchange = Exchange(await reader.readuntil(b"\r\n\r\n"), reader, writer, self._server)
        self.requests += 1
        rule = next((rule for rule in self.rules if rule.strikes(exchange)), None)
        if rule is None:
            await exchange.reply(await exchange.answer())
        else:
            await rule.fault.strike(exchange)
        return not exchange.is_over
