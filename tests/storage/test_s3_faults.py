"""Servers that lie, break off or are busy: a small HTTP server that answers what a test tells it to."""

import base64
import hashlib
import http.client
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.config import Config

from fleetpress.storage import s3, s3_client
from fleetpress.storage.errors import (
    AccessDenied,
    NotWritable,
    ObjectNotFound,
    SourceChanged,
    StorageError,
    StoreUnreachable,
    UploadGone,
)
from fleetpress.storage.etags import Part
from fleetpress.storage.s3 import S3Store
from fleetpress.storage.s3_client import new_client
from fleetpress.storage.store import MIN_PART_BYTES, ObjectInfo

_SECRET = "secret-that-no-message-may-hold"


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
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{_SECRET}</Message></Error>"
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


@pytest.fixture
def server() -> Iterator[FakeS3]:
    fake = FakeS3()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


@pytest.fixture
def fake_store(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3, "_CONFLICT_WAITS_SECONDS", (0.0, 0.0))
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    return S3Store("s3://bucket/root", new_client(endpoint=endpoint, access_key="a", secret_key=_SECRET))


@pytest.fixture
def patient_store(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Its client tries again, as clients do, but at once."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    return S3Store("s3://bucket", new_client(endpoint=endpoint, access_key="a", secret_key=_SECRET))


def _relayed(endpoint: str, request: Request) -> Reply:
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


def _stored(objects: dict[str, bytes], request: Request) -> Reply:
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


def test_probe_sees_that_conditions_are_ignored(server: FakeS3, fake_store: S3Store) -> None:
    objects: dict[str, bytes] = {}
    server.answer = lambda request: _stored(objects, request)
    probe = fake_store.probe()
    assert (probe.reachable, probe.writable, probe.conditional_writes) == (True, True, False)
    assert "If-None-Match" in probe.problem
    assert objects == {}


def test_probe_of_a_store_that_may_only_be_read(server: FakeS3, fake_store: S3Store) -> None:
    server.answer = lambda _: refusal(403, "AccessDenied")
    probe = fake_store.probe()
    assert (probe.reachable, probe.writable, probe.conditional_writes) == (True, False, False)
    assert "access denied" in probe.problem


def test_own_write_answered_with_412(server: FakeS3, fake_store: S3Store) -> None:
    """The reply to the first attempt was lost, the client's second one meets its own object."""
    server.answer = lambda request: (
        refusal(412, "PreconditionFailed")
        if request.method == "PUT"
        else Reply(200, b"mine", {"ETag": '"x"'})
    )
    assert fake_store.put_if_absent("claim", b"mine")
    assert not fake_store.put_if_absent("claim", b"theirs")
    assert server.requests[0].headers["if-none-match"] == "*"


def test_gone_after_412(server: FakeS3, fake_store: S3Store) -> None:
    server.answer = lambda request: (
        refusal(412, "PreconditionFailed") if request.method == "PUT" else refusal(404, "NoSuchKey")
    )
    assert not fake_store.put_if_absent("claim", b"mine")


@pytest.mark.parametrize(("conflicts", "accepted"), [(2, True), (3, False)])
def test_conflicts_are_tried_again(
    server: FakeS3, fake_store: S3Store, conflicts: int, accepted: bool
) -> None:
    server.answer = lambda _: (
        refusal(409, "ConditionalRequestConflict")
        if len(server.requests) <= conflicts
        else Reply(200, headers={"ETag": '"x"'})
    )
    if accepted:
        assert fake_store.put_if_absent("claim", b"mine")
    else:
        with pytest.raises(StoreUnreachable, match="409"):
            fake_store.put_if_absent("claim", b"mine")
    assert len(server.requests) == 3


_RANGE = {"ETag": '"e"', "Content-Range": "bytes 2-5/10"}


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        (Reply(206, b"2345", _RANGE), None, ""),
        (Reply(206, b"234", {**_RANGE, "Content-Range": "bytes 2-4/5"}), SourceChanged, "ends before byte 6"),
        (Reply(206, b"234", _RANGE), SourceChanged, "ends before byte 6"),
        (Reply(206, b"3456", {**_RANGE, "Content-Range": "bytes 3-6/10"}), SourceChanged, "ends before"),
        (Reply(206, b"2345", {**_RANGE, "ETag": '"other"'}), SourceChanged, "changed"),
        (Reply(200, b"0123456789", {"ETag": '"e"'}), StoreUnreachable, "does not serve ranges"),
        (Reply(206, b"23", _RANGE, announced_bytes=4), StoreUnreachable, "broke"),
        (refusal(412, "PreconditionFailed"), SourceChanged, "changed"),
        (refusal(416, "InvalidRange"), SourceChanged, "ends before"),
    ],
    ids=["right", "short", "short-unannounced", "shifted", "etag", "whole", "cut", "412", "416"],
)
def test_ranges(
    server: FakeS3, fake_store: S3Store, reply: Reply, kind: type[StorageError] | None, text: str
) -> None:
    server.answer = lambda _: reply
    if kind is None:
        assert fake_store.get_range("k", 2, 4, etag="e") == b"2345"
    else:
        with pytest.raises(kind, match=rf"s3://bucket/root/k.*{text}"):
            fake_store.get_range("k", 2, 4, etag="e")
        with pytest.raises(kind, match=rf"s3://bucket/root/k.*{text}"):
            fake_store.read_into("k", 2, memoryview(bytearray(4)), etag="e")
    assert server.requests[0].headers["range"] == "bytes=2-5"
    assert server.requests[0].headers["if-match"] == '"e"'


def test_a_range_that_breaks_off_far_inside(server: FakeS3, fake_store: S3Store) -> None:
    headers = {"ETag": '"e"', "Content-Range": f"bytes 0-{(3 << 20) - 1}/9000000"}
    server.answer = lambda _: Reply(206, b"x" * (2 << 20), headers, announced_bytes=3 << 20)
    with pytest.raises(StoreUnreachable, match=r"s3://bucket/root/k .*connection broke"):
        fake_store.read_into("k", 0, memoryview(bytearray(3 << 20)), etag="e")


def test_body_that_breaks_off(server: FakeS3, fake_store: S3Store) -> None:
    server.answer = lambda _: Reply(200, b"x" * 1000, {"ETag": '"e"'}, announced_bytes=3 << 20)
    with pytest.raises(StoreUnreachable, match=r"s3://bucket/root/k .*connection broke"):
        fake_store.get("k")


def test_flipped_bit(server: FakeS3, fake_store: S3Store) -> None:
    """The checksum of a whole object is compared only when the body is read past its end."""
    server.answer = lambda _: Reply(200, b"bytes", {"ETag": '"e"', "x-amz-checksum-crc32": "AAAAAA=="})
    with pytest.raises(StoreUnreachable, match="checksum"):
        fake_store.get("k")


def test_whole_checksum_on_a_range(
    server: FakeS3, fake_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some servers send it; the message names the setting that helps, and the setting does help."""
    server.answer = lambda _: Reply(206, b"2345", {**_RANGE, "x-amz-checksum-crc32": "AAAAAA=="})
    with pytest.raises(StoreUnreachable, match="AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"):
        fake_store.get_range("k", 2, 4)
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    client = new_client(endpoint=endpoint, access_key="a", secret_key=_SECRET)
    assert S3Store("s3://bucket/root", client).get_range("k", 2, 4) == b"2345"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (refusal(503, "SlowDown"), StoreUnreachable),
        (refusal(500, "InternalError"), StoreUnreachable),
        (refusal(403, "SignatureDoesNotMatch"), AccessDenied),
        (refusal(403, "SomethingNew"), AccessDenied),
        (refusal(400, "ExpiredToken"), AccessDenied),
        (refusal(403, "RequestTimeTooSkewed"), AccessDenied),
        (refusal(403, "InvalidObjectState"), AccessDenied),
        (refusal(404, "NoSuchKey"), ObjectNotFound),
        (refusal(405, "MethodNotAllowed"), NotWritable),
        (refusal(507, "QuotaExceeded"), NotWritable),
        (refusal(400, "EntityTooSmall"), NotWritable),
        (refusal(404, "NoSuchUpload"), UploadGone),
        (refusal(400, "InvalidPart"), UploadGone),
        (refusal(400, "BadDigest"), StoreUnreachable),
        (refusal(501, "NotImplemented"), NotWritable),
        (refusal(418, "Teapot"), StoreUnreachable),
        (Reply(200, b"<html>a proxy's login page", {"Content-Type": "text/html"}), None),
    ],
    ids=lambda value: value.body[36:60].decode() if isinstance(value, Reply) else None,
)
def test_refusals(server: FakeS3, fake_store: S3Store, reply: Reply, kind: type[StorageError] | None) -> None:
    server.answer = lambda _: reply
    actions = [lambda: fake_store.put("k", b"1"), fake_store.list] if kind else [fake_store.list]
    for action in actions:
        with pytest.raises(kind or StoreUnreachable, match=r"s3://bucket/root/.* at http://127") as caught:
            action()
        assert _SECRET not in str(caught.value)


def test_retries_by_default(server: FakeS3, patient_store: S3Store) -> None:
    server.answer = lambda _: (
        refusal(503, "SlowDown") if len(server.requests) < 4 else Reply(200, b"1", {"ETag": '"x"'})
    )
    assert patient_store.get("k") == b"1"
    assert len(server.requests) == 4


def test_list_of_several_pages(server: FakeS3, fake_store: S3Store) -> None:
    """Each page is one request, and the order is ours, not the server's."""

    def page(request: Request) -> Reply:
        last = "continuation-token=more" in request.path
        keys = ["a-b"] if last else ["b", "a/b"]
        items = "".join(
            f'<Contents><Key>root/{k}</Key><Size>1</Size><ETag>"{k}"</ETag></Contents>' for k in keys
        )
        truncated = (
            "<IsTruncated>false</IsTruncated>"
            if last
            else ("<IsTruncated>true</IsTruncated><NextContinuationToken>more</NextContinuationToken>")
        )
        return Reply(200, f"<ListBucketResult>{truncated}{items}</ListBucketResult>".encode())

    server.answer = page
    assert [(info.key, info.etag) for info in fake_store.list()] == [
        ("a-b", "a-b"),
        ("a/b", "a/b"),
        ("b", "b"),
    ]
    assert len(server.requests) == 2


def _crc32_of(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


@pytest.mark.parametrize("write", ["put", "put_if_absent", "upload_part"])
def test_what_is_sent(server: FakeS3, patient_store: S3Store, write: str) -> None:
    """The bytes once, their checksum in a signed header, nothing hashed for a signature; also when sent again."""
    data = bytes(range(256)) * 4001
    server.answer = lambda _: (
        refusal(503, "SlowDown") if len(server.requests) < 2 else Reply(200, headers={"ETag": '"e"'})
    )
    if write == "upload_part":
        etag = patient_store.upload_part("k", "id", number=3, offset=7, data=memoryview(data))
        assert etag == str(Part(7, len(data), zlib.crc32(data), "e"))
        assert server.requests[1].path == "/bucket/k?uploadId=id&partNumber=3"
    else:
        getattr(patient_store, write)("k", data)
    assert [request.body for request in server.requests] == [data, data]
    for request in server.requests:
        assert request.headers["x-amz-checksum-crc32"] == _crc32_of(data)
        assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert "x-amz-checksum-crc32" in request.headers["authorization"]
        assert not {"x-amz-trailer", "content-encoding", "transfer-encoding"} & request.headers.keys()


def test_a_slow_server_gets_it_all(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives every single send no longer than a connection may take."""
    impatient = Config(connect_timeout=0.3, read_timeout=5, retries={"max_attempts": 0})
    monkeypatch.setattr(s3_client, "_config", lambda: impatient)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    store = S3Store("s3://bucket", new_client(endpoint=endpoint, access_key="a", secret_key="b"))
    server.answer = lambda _: Reply(200, headers={"ETag": '"e"'})
    server.seconds_per_mib = 0.04
    store.put("k", bytes(30 << 20))
    assert len(server.requests[0].body) == 30 << 20


class _NoBody:
    def stream(self) -> Iterator[bytes]:
        return iter(())


def test_the_same_is_sent_over_https() -> None:
    """There the client would wrap the bytes in chunks with a checksum behind them, were it not given one."""
    client = new_client(endpoint="https://127.0.0.1:1", access_key="a", secret_key="b")
    sent: list[AWSPreparedRequest] = []

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        sent.append(request)
        return AWSResponse(request.url, 200, {"ETag": '"e"'}, _NoBody())

    client.meta.events.register("before-send.s3", answer)
    store = S3Store("s3://bucket", client)
    store.put("k", b"data")
    store.upload_part("k", "id", number=1, offset=0, data=b"data")
    for request in sent:
        assert bytes(request.body.read()) == b"data"
        assert request.headers["x-amz-checksum-crc32"] == _crc32_of(b"data").encode()
        assert request.headers["x-amz-content-sha256"] == b"UNSIGNED-PAYLOAD"
        assert not {"x-amz-trailer", "content-encoding"} & {name.lower() for name in request.headers}
    assert len(sent) == 2


def test_a_profile_may_have_the_bytes_signed(
    server: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n    payload_signing_enabled = true\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    server.answer = lambda _: Reply(200, headers={"ETag": '"e"'})
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    data = bytes(range(256)) * 4001
    S3Store("s3://bucket", new_client(endpoint=endpoint, access_key="a", secret_key="b")).put("k", data)
    assert server.requests[0].headers["x-amz-content-sha256"] == hashlib.sha256(data).hexdigest()
    assert server.requests[0].body == data


def test_completed_but_the_reply_was_lost(
    server: FakeS3, patient_store: S3Store, moto_server: str, s3_uri: str
) -> None:
    """AWS forgets an upload once it is complete: the client's second try hears that there is no such upload."""
    store = S3Store(s3_uri, patient_store._client)
    completions: list[Reply] = []

    def answer(request: Request) -> Reply:
        if request.method != "POST" or "uploadId=" not in request.path:
            return _relayed(moto_server, request)
        if completions:
            return refusal(404, "NoSuchUpload")
        completions.append(_relayed(moto_server, request))
        return completions[0]._replace(body=completions[0].body[:20], announced_bytes=500)

    server.answer = answer
    parts = [b"a" * MIN_PART_BYTES, b"b"]
    upload_id = store.create_upload("k")
    etags = [
        store.upload_part("k", upload_id, number=n + 1, offset=n * MIN_PART_BYTES, data=part)
        for n, part in enumerate(parts)
    ]
    info = store.complete_upload("k", upload_id, etags)
    assert completions[0].status == 200
    assert info == S3Store(s3_uri).head("k")
    assert S3Store(s3_uri).get("k") == b"".join(parts)


_MD5S = [hashlib.md5(data).hexdigest() for data in (b"one", b"two")]
_MD5_OF_MD5S = hashlib.md5(b"".join(map(bytes.fromhex, _MD5S))).hexdigest() + "-2"


@pytest.mark.parametrize(
    ("part_etags", "found", "complete"),
    [
        (_MD5S, Reply(200, b"", {"ETag": f'"{_MD5_OF_MD5S}"'}, 6), True),
        (_MD5S, Reply(200, b"", {"ETag": f'"{_MD5_OF_MD5S}"'}, 7), False),
        (_MD5S, Reply(200, b"", {"ETag": f'"{_MD5S[0]}-2"'}, 6), False),
        (_MD5S, Reply(404), False),
        (_MD5S[::-1], Reply(200, b"", {"ETag": f'"{_MD5_OF_MD5S}"'}, 6), False),
        (["encrypted", "by-a-key"], Reply(200, b"", {"ETag": f'"{_MD5_OF_MD5S}"'}, 6), False),
    ],
    ids=["the same", "size", "etag", "nothing", "order", "no MD5s"],
)
def test_no_such_upload(
    server: FakeS3, fake_store: S3Store, part_etags: list[str], found: Reply, complete: bool
) -> None:
    server.answer = lambda request: (
        refusal(404, "NoSuchUpload")
        if request.method == "POST"
        else (found if request.path.endswith("/k") else Reply())
    )
    etags = [str(Part(3 * n, 3, n, etag)) for n, etag in enumerate(part_etags)]
    if complete:
        made = ObjectInfo(key="k", size_bytes=6, etag=_MD5_OF_MD5S)
        assert fake_store.complete_upload("k", "id", etags) == made
    else:
        with pytest.raises(UploadGone, match=r"s3://bucket/root/k at .*run again"):
            fake_store.complete_upload("k", "id", etags)


def test_every_part_and_its_checksum_is_named(server: FakeS3, fake_store: S3Store) -> None:
    """AWS wants the checksums of an upload that was created with their algorithm."""
    server.answer = lambda request: Reply(
        200,
        b"<InitiateMultipartUploadResult><UploadId>id</UploadId></InitiateMultipartUploadResult>"
        if request.path.endswith("?uploads")
        else b'<CompleteMultipartUploadResult><ETag>"whole-2"</ETag></CompleteMultipartUploadResult>',
    )
    assert fake_store.create_upload("k") == "id"
    assert server.requests[0].headers["x-amz-checksum-algorithm"] == "CRC32"
    etags = [str(Part(0, 3, zlib.crc32(b"one"), "e1")), str(Part(3, 3, zlib.crc32(b"two"), "e2"))]
    assert fake_store.complete_upload("k", "id", etags).etag == "whole-2"
    body = server.requests[1].body.decode()
    for number, etag, data in ((1, "e1", b"one"), (2, "e2", b"two")):
        assert f"<PartNumber>{number}</PartNumber>" in body
        assert f'<ETag>"{etag}"</ETag>' in body
        assert f"<ChecksumCRC32>{_crc32_of(data)}</ChecksumCRC32>" in body


def test_a_failed_put_in_parts_leaves_nothing(
    server: FakeS3, fake_store: S3Store, moto_server: str, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_ONE_REQUEST_BYTES", 4 * MIN_PART_BYTES)
    server.answer = lambda request: (
        refusal(507, "QuotaExceeded") if "partNumber=3" in request.path else _relayed(moto_server, request)
    )
    with pytest.raises(NotWritable, match="no room left"):
        S3Store(s3_uri, fake_store._client).put("k", bytes(4 * MIN_PART_BYTES))
    assert server.requests[-1].method == "DELETE"
    bucket = s3_uri.removeprefix("s3://")
    assert "Uploads" not in S3Store(s3_uri)._client.list_multipart_uploads(Bucket=bucket)
    assert S3Store(s3_uri).list() == []
