"""A slow network in front of an S3 server on this machine: an HTTP/1.1 relay on loopback.

    python benchmarks/checkpoints/relay.py http://127.0.0.1:8333 [--megabytes-per-second 100] [--milliseconds 20]

Every connection moves at most so many bytes a second in each direction, and every request waits once. Requests go on as
they came, `Host` too, so signatures hold; only `Expect: 100-continue` is answered here and dropped. Prints a line of
JSON with its port, and when SIGTERM comes one with what went through, bodies only, and its own CPU seconds:
{"GET": {"requests": 3, "bytes_sent": 0, "bytes_received": 12}, ..., "cpu_seconds": 0.1}, as the client sees it.
"""

import argparse
import asyncio
import contextlib
import json
import re
import signal
import socket
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

HOST = "127.0.0.1"
PIECE_BYTES = 256 << 10
HEAD_BYTES = 64 << 10
CREDIT_SECONDS = 0.005  # what a sleep that took too long may make up for
_EXPECT = re.compile(rb"(?im)^expect:[ \t]*100-continue[ \t]*\r\n")
_CHUNKED = re.compile(rb"(?im)^transfer-encoding:[^\r\n]*\bchunked\b")
_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d+)")
_CLOSE = re.compile(rb"(?im)^connection:[ \t]*close\b|\A[^\r\n]*HTTP/1\.0\b")


class HungUp(Exception):
    """The other side has closed the connection, or speaks no HTTP/1.1."""


@dataclass
class Count:
    """What went through for one method."""

    requests: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, kw_only=True)
class Network:
    """Where to, and how slow; a rate of 0 is none."""

    host: str
    port: int
    bytes_per_second: float
    latency_seconds: float
    counts: defaultdict[str, Count] = field(default_factory=lambda: defaultdict(Count))


class Pace:
    """One direction of one connection, never faster than a rate."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free = 0.0  # when the line will have carried all that was sent

    async def carry(self, count: int) -> None:
        """Wait until the line has carried `count` more bytes."""
        if not self._rate:
            return
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now - CREDIT_SECONDS) + count / self._rate
        if self._free > now:
            await asyncio.sleep(self._free - now)


class Line:
    """A socket, with what was read beyond the end of a message."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._start = self._end = 0
        self._loop = asyncio.get_running_loop()

    def is_closed(self) -> bool:
        """Whether the other side has closed an idle line."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def some(self, most: int) -> memoryview:
        """What is there, at most `most` bytes, valid until the next read. Raises HungUp."""
        if self._start == self._end:
            self._start, self._end = 0, await self._loop.sock_recv_into(self._sock, self._buffer)
            if not self._end:
                raise HungUp
        found = self._buffer[self._start : min(self._end, self._start + most)]
        self._start += len(found)
        return found

    async def until(self, end: bytes) -> bytes:
        """Up to and with `end`. Raises HungUp."""
        found = bytearray()
        while len(found) < HEAD_BYTES:
            found += await self.some(HEAD_BYTES)
            place = found.find(end)
            if place >= 0:
                self._start -= len(found) - place - len(end)  # what follows is in the buffer still
                return bytes(found[: place + len(end)])
        raise HungUp

    async def send(self, data: bytes | memoryview) -> None:
        """All of it."""
        await self._loop.sock_sendall(self._sock, data)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


async def move(count: int, source: Line, target: Line, pace: Pace) -> int:
    """So many bytes at the line's pace."""
    left = count
    while left:
        piece = await source.some(left)
        await target.send(piece)
        await pace.carry(len(piece))
        left -= len(piece)
    return count


async def move_chunks(source: Line, target: Line, pace: Pace) -> int:
    """A chunked body with its trailers; gives the bytes of its chunks."""
    total = 0
    while True:
        line = await source.until(b"\n")
        await target.send(line)
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        total += await move(size, source, target, pace)
        await target.send(await source.until(b"\n"))
    while line.strip():
        line = await source.until(b"\n")
        await target.send(line)
    return total


async def move_body(head: bytes, source: Line, target: Line, pace: Pace) -> int:
    """The body that the head announces; gives its bytes."""
    if _CHUNKED.search(head):
        return await move_chunks(source, target, pace)
    length = _LENGTH.search(head)
    return await move(int(length[1]), source, target, pace) if length else 0


class Connection:
    """One client and the line to the server that is kept for it."""

    def __init__(self, client: socket.socket, network: Network) -> None:
        self._network = network
        self._client = Line(client)
        self._server: Line | None = None
        self._up, self._down = Pace(network.bytes_per_second), Pace(network.bytes_per_second)

    async def serve(self) -> None:
        """Every request of the client until one side hangs up."""
        with contextlib.suppress(HungUp, OSError):
            while await self._request():
                pass
        self._client.close()
        if self._server:
            self._server.close()

    async def _request(self) -> bool:
        head = await self._client.until(b"\r\n\r\n")
        method = head.partition(b" ")[0].decode("ascii", "replace")
        count = self._network.counts[method]
        count.requests += 1
        await asyncio.sleep(self._network.latency_seconds)
        if _EXPECT.search(head):
            head = _EXPECT.sub(b"", head)
            await self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        server = await self._line_to_server()
        await server.send(head)
        sent = await move_body(head, self._client, server, self._up)
        count.bytes_sent += sent  # not in one statement: other connections count while this one waits
        answer = await server.until(b"\r\n\r\n")
        while answer.split(b" ", 2)[1].startswith(b"1"):
            answer = await server.until(b"\r\n\r\n")
        await self._client.send(answer)
        if method != "HEAD":
            received = await move_body(answer, server, self._client, self._down)
            count.bytes_received += received
        return not (_CLOSE.search(head) or _CLOSE.search(answer))

    async def _line_to_server(self) -> Line:
        if self._server is not None and not self._server.is_closed():
            return self._server
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (self._network.host, self._network.port))
        self._server = Line(sock)
        return self._server


async def relay(network: Network) -> None:
    """Serve until SIGTERM; prints the port first."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    listener = socket.create_server((HOST, 0), backlog=128)
    listener.setblocking(False)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    running: set[asyncio.Task[None]] = set()

    async def accept() -> None:
        while True:
            client, _ = await loop.sock_accept(listener)
            task = loop.create_task(Connection(client, network).serve())
            running.add(task)
            task.add_done_callback(running.discard)

    accepting = loop.create_task(accept())
    await stop.wait()
    accepting.cancel()
    for task in running:
        task.cancel()


def main() -> None:
    """Relay to the server that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("server", metavar="http://HOST:PORT")
    parser.add_argument("--megabytes-per-second", type=float, default=100, help="0: as fast as it goes")
    parser.add_argument("--milliseconds", type=float, default=20)
    arguments = parser.parse_args()
    place = urlsplit(arguments.server)
    network = Network(
        host=place.hostname or HOST,
        port=place.port or 80,
        bytes_per_second=arguments.megabytes_per_second * 1e6,
        latency_seconds=arguments.milliseconds / 1e3,
    )
    asyncio.run(relay(network))
    counts: dict[str, object] = {method: asdict(count) for method, count in sorted(network.counts.items())}
    print(json.dumps(counts | {"cpu_seconds": round(time.process_time(), 3)}), flush=True)


if __name__ == "__main__":
    main()
