"""Servers that lie, break off or are busy: a small HTTP server that answers what a test tells it to."""

import pytest
from fleetpress_test_fake_s3 import (  # by this name conftest.py loads fake_s3.py
    SECRET,
    FakeS3,
    Reply,
    Request,
    refusal,
    stored,
)

from fleetpress.storage.errors import (
    AccessDenied,
    NotWritable,
    ObjectNotFound,
    SourceChanged,
    StorageError,
    StoreUnreachable,
    UploadGone,
)
from fleetpress.storage.s3 import S3Store
from fleetpress.storage.s3_client import new_client


def test_probe_sees_that_conditions_are_ignored(server: FakeS3, fake_store: S3Store) -> None:
    objects: dict[str, bytes] = {}
    server.answer = lambda request: stored(objects, request)
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


def test_a_conflict_with_another_write_is_for_the_scheduler_to_try_again(
    server: FakeS3, fake_store: S3Store
) -> None:
    server.answer = lambda _: refusal(409, "ConditionalRequestConflict")
    with pytest.raises(StoreUnreachable, match="another write of the same name is under way"):
        fake_store.put_if_absent("claim", b"mine")
    assert len(server.requests) == 1


_RANGE = {"ETag": '"e"', "Content-Range": "bytes 2-5/10"}


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        (Reply(206, b"2345", _RANGE), None, ""),
        (Reply(206, b"234", {**_RANGE, "Content-Range": "bytes 2-4/5"}), SourceChanged, "ends before byte 6"),
        (Reply(206, b"234", _RANGE), StoreUnreachable, "does not hold the bytes"),
        (Reply(206, b"3456", {**_RANGE, "Content-Range": "bytes 3-6/10"}), StoreUnreachable, "does not hold"),
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
    client = new_client(endpoint=endpoint, access_key="a", secret_key=SECRET)
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
        assert SECRET not in str(caught.value)


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
