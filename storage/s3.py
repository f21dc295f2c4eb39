"""An S3 bucket, or a prefix in one, as an object store: AWS and every compatible server, through boto3."""

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from .errors import BucketNotFound, ObjectNotFound, SourceChanged, StoreUnreachable
from .s3_client import shared_client
from .s3_errors import error_code, s3_errors, without_userinfo
from .store import ObjectInfo, StoreProbe, probe_store
from .uri import bucket_and_prefix, is_valid_key, normalize, validate_key

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef

_PIECE_BYTES = 1 << 20
# Below this an upload is one request, and its etag the MD5 of the bytes, as in a folder store.
_ONE_REQUEST_BYTES = 64 << 20
_CONFLICT_WAITS_SECONDS = (0.1, 0.2, 0.4, 0.8)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _Body(Protocol):
    def read(self, amt: int | None = ..., /) -> bytes: ...

    def close(self) -> None: ...


class S3Store:
    """Objects below `s3://bucket/prefix`. Without `client`, the AWS_* variables and profiles say where and who."""

    def __init__(self, uri: str, client: "S3Client | None" = None) -> None:
        self.uri = normalize(uri)
        self._bucket, prefix = bucket_and_prefix(self.uri)
        self._root = f"{prefix}/" if prefix else ""
        self._own_client = client

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        with self._errors("read", key):
            reply = self._client.get_object(Bucket=self._bucket, Key=self._full(key))
            return _read(reply["Body"], reply["ContentLength"], self._place(key))

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """See ObjectStore. Altered bytes within a range go unseen here: S3 has no checksum of a part."""
        assert start >= 0
        assert length >= 0
        if length == 0:  # HTTP has no empty range
            if self.head(key).etag != etag and etag is not None:
                raise SourceChanged(
                    f"{self._place(key)} has changed since this run planned with it: run again"
                )
            return b""
        with self._errors("read", key):
            reply = self._get_range(key, f"bytes={start}-{start + length - 1}", etag)
            try:
                self._check_range(key, reply, start, length, etag)
                return _read(reply["Body"], length, self._place(key))
            finally:
                reply["Body"].close()

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        try:
            with self._errors("look up", key):
                reply = self._client.head_object(Bucket=self._bucket, Key=self._full(key))
        except ObjectNotFound:
            self._require_bucket()  # the reply to a HEAD has no body that would say which of the two is missing
            raise
        return ObjectInfo(key=key, size_bytes=reply["ContentLength"], etag=reply["ETag"].strip('"'))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """See ObjectStore."""
        found: list[ObjectInfo] = []
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._root + prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self._root)
                    if key.startswith(prefix) and is_valid_key(key):  # some servers take "a//" for "a/"
                        found.append(
                            ObjectInfo(key=key, size_bytes=item["Size"], etag=item["ETag"].strip('"'))
                        )
        # Servers disagree on the order of "a/b" and "a-b".
        return sorted(found, key=lambda info: info.key.encode())

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """See ObjectStore. 64 MiB and more go up in parts, and then the etag is not the MD5 of the bytes."""
        with self._errors("write", key):
            if len(data) < _ONE_REQUEST_BYTES:
                reply = self._client.put_object(Bucket=self._bucket, Key=self._full(key), Body=data)
                return ObjectInfo(key=key, size_bytes=len(data), etag=reply["ETag"].strip('"'))
            self._client.upload_fileobj(
                io.BytesIO(data),
                self._bucket,
                self._full(key),
                Config=TransferConfig(
                    multipart_threshold=_ONE_REQUEST_BYTES, multipart_chunksize=_ONE_REQUEST_BYTES // 4
                ),
            )
        return self.head(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        with self._errors("write", key):
            if self._create(key, data):
                return True
        # A lost reply makes the client repeat its own successful write and get 412 for it: what is there decides.
        try:
            return self.get(key) == data
        except ObjectNotFound:
            return False

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        with self._errors("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=self._full(key))

    def probe(self) -> StoreProbe:
        """See ObjectStore."""
        return probe_store(self)

    @property
    def _client(self) -> "S3Client":
        return self._own_client or shared_client()

    def _full(self, key: str) -> str:
        return self._root + validate_key(key)

    def _place(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._root}{key}"

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        with s3_errors(action, self._place(key), self._client.meta.endpoint_url):
            yield

    def _require_bucket(self) -> None:
        try:
            with self._errors("look up", ""):
                self._client.head_bucket(Bucket=self._bucket)
        except ObjectNotFound as error:
            endpoint = without_userinfo(self._client.meta.endpoint_url)
            raise BucketNotFound(
                f"there is no bucket {self._bucket!r} at {endpoint}: create it, or correct the uri or AWS_ENDPOINT_URL"
            ) from error

    def _get_range(self, key: str, byte_range: str, etag: str | None) -> "GetObjectOutputTypeDef":
        full = self._full(key)
        if etag is None:
            return self._client.get_object(Bucket=self._bucket, Key=full, Range=byte_range)
        return self._client.get_object(Bucket=self._bucket, Key=full, Range=byte_range, IfMatch=f'"{etag}"')

    def _check_range(
        self, key: str, reply: "GetObjectOutputTypeDef", start: int, length: int, etag: str | None
    ) -> None:
        """boto3 takes any range for the one asked for, and not every server honours If-Match."""
        place = self._place(key)
        if etag is not None and reply["ETag"].strip('"') != etag:
            raise SourceChanged(f"{place} has changed since this run planned with it: run again")
        sent = _CONTENT_RANGE.fullmatch(reply.get("ContentRange", ""))
        if sent is None:
            raise StoreUnreachable(f"{place}: the server does not serve ranges of bytes; use another one")
        if (int(sent[1]), int(sent[2])) != (start, start + length - 1) or reply["ContentLength"] != length:
            raise SourceChanged(
                f"{place} ends before byte {start + length}: it was truncated, or its index is wrong"
            )

    def _create(self, key: str, data: bytes) -> bool:
        """Whether a conditional write was accepted; ClientError for anything but "exists" and lasting conflicts."""
        for wait_seconds in (*_CONFLICT_WAITS_SECONDS, None):
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._full(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if error_code(error) in ("PreconditionFailed", "412"):
                    return False
                # AWS answers 409 while another write to the key is under way: its outcome is not known yet.
                if error_code(error) not in ("ConditionalRequestConflict", "409") or wait_seconds is None:
                    raise
                time.sleep(wait_seconds)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")


def _read(body: _Body, length: int, place: str) -> bytes:
    """The whole body in pieces; the read past the end is what makes botocore compare length and checksum."""
    buffer = io.BytesIO()
    if length:  # room for all of it at once: getvalue() then hands it out without a copy
        buffer.seek(length - 1)
        buffer.write(b"\0")
        buffer.seek(0)
    try:
        while piece := body.read(_PIECE_BYTES):
            buffer.write(piece)
            if buffer.tell() > length:
                raise StoreUnreachable(f"{place}: the server sent more bytes than it announced")
    finally:
        body.close()
    if buffer.tell() != length:
        raise StoreUnreachable(
            f"{place}: the connection broke after {buffer.tell()} of {length} bytes: try again"
        )
    return buffer.getvalue()
