"""A small S3 server that answers what a test tells it to: for servers that lie, break off or are busy."""

import http.client
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

SECRET = "secret-that-no-message-may-hold"


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Reply(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}
    announced_bytes: int | None = None  # Content-Length, when it is not the body's


def refusal(status: int, code: str) -> Reply:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{SECRET}</Message></Error>"
    return Reply(status, text.encode(), {"Content-Type": "application/xml"})


class FakeS3(ThreadingHTTPServer):
    daemon_threads = True
    answer: Callable[[Request], Reply]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[Request] = []
        self.seconds_per_mib = 0.0  # how slowly it reads


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeS3

    def _serve(self) -> None:
        body = self._body(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        self.server.requests.append(request)
        reply = self.server.answer(request)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        length = len(reply.body) if reply.announced_bytes is None else reply.announced_bytes
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)
        self.close_connection = length != len(reply.body)

    def _body(self, length: int) -> bytes:
        body = bytearray()
        while len(body) < length:
            body += self.rfile.read(min(1 << 20, length - len(body)))
            time.sleep(self.server.seconds_per_mib)
        return bytes(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def relayed(endpoint: str, request: Request) -> Reply:
    """What the server at `endpoint` answers."""
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
    try:
        headers = {name: value for name, value in request.headers.items() if name != "expect"}
        connection.request(request.method, request.path, request.body, headers)
        reply = connection.getresponse()
        kept = {name: value for name, value in reply.getheaders() if name in ("ETag", "Content-Type")}
        length = int(reply.headers["Content-Length"]) if request.method == "HEAD" else None
        return Reply(reply.status, reply.read(), kept, length)
    finally:
        connection.close()


def stored(objects: dict[str, bytes], request: Request) -> Reply:
    """A server that keeps objects and ignores every condition."""
    key = request.path.partition("?")[0]
    if request.method == "PUT":
        objects[key] = request.body
        return Reply(200, headers={"ETag": '"x"'})
    if request.method == "DELETE":
        objects.pop(key, None)
        return Reply(204)
    if key not in objects:
        return refusal(404, "NoSuchKey")
    return Reply(200, objects[key], {"ETag": '"x"'})
