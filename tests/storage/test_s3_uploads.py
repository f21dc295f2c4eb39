"""What is sent to an S3 server, byte for byte and header by header, and what is made of replies that got lost."""

import base64
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.config import Config
from fleetpress_test_fake_s3 import (  # by this name conftest.py loads fake_s3.py
    FakeS3,
    Reply,
    Request,
    refusal,
    relayed,
)

from fleetpress.storage import s3, s3_client
from fleetpress.storage.errors import (
    NotWritable,
    UploadGone,
)
from fleetpress.storage.etags import Part
from fleetpress.storage.s3 import S3Store
from fleetpress.storage.s3_client import new_client
from fleetpress.storage.store import MIN_PART_BYTES, ObjectInfo


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
            return relayed(moto_server, request)
        if completions:
            return refusal(404, "NoSuchUpload")
        completions.append(relayed(moto_server, request))
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
        refusal(507, "QuotaExceeded") if "partNumber=3" in request.path else relayed(moto_server, request)
    )
    with pytest.raises(NotWritable, match="no room left"):
        S3Store(s3_uri, fake_store._client).put("k", bytes(4 * MIN_PART_BYTES))
    assert server.requests[-1].method == "DELETE"
    bucket = s3_uri.removeprefix("s3://")
    assert "Uploads" not in S3Store(s3_uri)._client.list_multipart_uploads(Bucket=bucket)
    assert S3Store(s3_uri).list() == []
