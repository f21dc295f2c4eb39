"""An S3 bucket, or a prefix in one, as an object store: AWS and every compatible server, through boto3."""

import base64
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, cast

from botocore.exceptions import ClientError

from .errors import (
    AccessDenied,
    BucketNotFound,
    ObjectNotFound,
    SourceChanged,
    StorageError,
    StoreUnreachable,
    UploadGone,
)
from .etags import Part, parse_parts
from .s3_bodies import Body, body_of, fill
from .s3_client import shared_client
from .s3_errors import error_code, s3_errors
from .store import MAX_PARTS, ObjectInfo, StoreProbe, Unfinished, bytes_of, check_size, flat_view, probe_store
from .traffic import carried, note_read, note_written
from .uri import bucket_and_prefix, is_valid_key, normalize, validate_key, without_userinfo

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        GetObjectRequestTypeDef,
        HeadObjectOutputTypeDef,
    )

# Below this an upload is one request, and its etag the MD5 of the bytes.
_ONE_REQUEST_BYTES = 64 << 20
_UPLOAD_THREADS = 4
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class S3Store:
    """Objects below `s3://bucket/prefix`. Without `client`, the AWS_* variables and profiles say where and who."""

    def __init__(self, uri: str, client: "S3Client | None" = None) -> None:
        self.uri = normalize(uri)
        self._bucket, prefix = bucket_and_prefix(self.uri)
        self._root = f"{prefix}/" if prefix else ""
        self._own_client = client

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        """See ObjectStore."""
        with self._errors("read", key):
            reply = self._client.get_object(**self._asked(key, etag))
            self._check_etag(key, reply, etag)
            with closing(cast("Body", reply["Body"])) as body:
                check_size(self._place(key), reply["ContentLength"], most_bytes)
                data = bytes_of(lambda view: fill(view, body, self._place(key)), reply["ContentLength"])
        note_read(len(data))
        return data

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """See ObjectStore."""
        return bytes_of(lambda buffer: self.read_into(key, start, buffer, etag=etag), length)

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        """See ObjectStore. Altered bytes within a range go unseen here: S3 has no checksum of a part."""
        assert start >= 0
        if not buffer.nbytes:  # HTTP has no empty range
            if self.head(key).etag != etag and etag is not None:
                raise SourceChanged(
                    f"{self._place(key)} has changed since this run planned with it: run again"
                )
            return
        with self._errors("read", key):
            byte_range = f"bytes={start}-{start + buffer.nbytes - 1}"
            reply = self._client.get_object(**self._asked(key, etag, byte_range))
            with closing(cast("Body", reply["Body"])) as body:
                self._check_range(key, reply, start, buffer.nbytes, etag)
                fill(flat_view(buffer), body, self._place(key))
        note_read(buffer.nbytes)

    def stored_crc32(self, key: str, *, etag: str) -> tuple[int, int] | None:
        """See ObjectStore. Uploads in parts have one too, but of the parts' checksums: that is no help here."""
        with self._errors("look up", key):
            reply = self._client.head_object(
                Bucket=self._bucket, Key=self._full(key), IfMatch=f'"{etag}"', ChecksumMode="ENABLED"
            )
        self._check_etag(key, reply, etag)
        found = reply.get("ChecksumCRC32", "")
        if not found or "-" in found or reply.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
            return None
        try:
            return reply["ContentLength"], int.from_bytes(base64.b64decode(found, validate=True), "big")
        except ValueError:  # no base64: a server's own idea of a checksum
            return None

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

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ObjectStore."""
        return {info.key: info.size_bytes for info in self.list(prefix)}

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """See ObjectStore. 64 MiB and more go up in parts, and then the etag is not the MD5 of the bytes."""
        if len(data) >= _ONE_REQUEST_BYTES:
            return self._put_in_parts(key, memoryview(data))
        with self._errors("write", key):
            reply = self._client.put_object(
                Bucket=self._bucket,
                Key=self._full(key),
                Body=body_of(data),
                ChecksumCRC32=_checksum(zlib.crc32(data)),
            )
        note_written(len(data))
        return ObjectInfo(key=key, size_bytes=len(data), etag=reply["ETag"].strip('"'))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        with self._errors("write", key):
            if self._create(key, data):
                note_written(len(data))
                return True
        # A lost reply makes the client repeat its own successful write and get 412 for it: what is there decides.
        try:
            return self.get(key) == data
        except ObjectNotFound:
            return False

    def create_upload(self, key: str) -> str:
        """See ObjectStore."""
        with self._errors("write", key):
            reply = self._client.create_multipart_upload(
                Bucket=self._bucket, Key=self._full(key), ChecksumAlgorithm="CRC32"
            )
        return reply["UploadId"]

    def upload_part(
        self, key: str, upload_id: str, *, number: int, offset: int, data: memoryview | bytes
    ) -> str:
        """See ObjectStore. The server compares the CRC-32 of the bytes that arrive."""
        assert 1 <= number <= MAX_PARTS
        crc32 = zlib.crc32(data)
        with self._errors("write", key):
            reply = self._client.upload_part(
                Bucket=self._bucket,
                Key=self._full(key),
                UploadId=upload_id,
                PartNumber=number,
                Body=body_of(data),
                ChecksumCRC32=_checksum(crc32),
            )
        size_bytes = memoryview(data).nbytes
        note_written(size_bytes)
        return str(Part(offset, size_bytes, crc32, reply["ETag"].strip('"')))

    def upload_exists(self, key: str, upload_id: str) -> bool:
        """See ObjectStore."""
        try:
            with self._errors("look up", key):
                self._client.list_parts(
                    Bucket=self._bucket, Key=self._full(key), UploadId=upload_id, MaxParts=1
                )
        except UploadGone:
            return False
        return True

    def complete_upload(self, key: str, upload_id: str, etags: Sequence[str]) -> ObjectInfo:
        """See ObjectStore."""
        parts = parse_parts(etags, self._place(key))
        size_bytes = sum(part.size_bytes for part in parts)
        try:
            with self._errors("write", key):
                reply = self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._full(key),
                    UploadId=upload_id,
                    MultipartUpload={
                        "Parts": [
                            {
                                "PartNumber": number,
                                "ETag": f'"{part.etag}"',
                                "ChecksumCRC32": _checksum(part.crc32),
                            }
                            for number, part in enumerate(parts, 1)
                        ]
                    },
                )
        except UploadGone:
            # A lost reply makes the client repeat its own successful request: what is there decides.
            made = ObjectInfo(key=key, size_bytes=size_bytes, etag=_etag_of_parts(parts))
            if not self._is_there(made):
                raise
            return made
        return ObjectInfo(key=key, size_bytes=size_bytes, etag=reply["ETag"].strip('"'))

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See ObjectStore."""
        with suppress(UploadGone), self._errors("delete", key):
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._full(key), UploadId=upload_id)

    def list_unfinished(self) -> Sequence[Unfinished]:
        """See ObjectStore."""
        found: list[Unfinished] = []
        with self._errors("list the uploads of", ""):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._root
            )
            for page in pages:
                for item in page.get("Uploads", []):
                    key = item["Key"].removeprefix(self._root)
                    if item["Key"].startswith(self._root) and is_valid_key(key):
                        found.append(Unfinished(key=key, upload=item["UploadId"]))
        return sorted(found, key=lambda item: (item.key.encode(), item.upload))

    def discard(self, item: Unfinished) -> None:
        """See ObjectStore."""
        self.abort_upload(item.key, item.upload)

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
        except AccessDenied:
            return  # who may list a prefix only may not ask for the bucket; it is the object that is missing
        except ObjectNotFound as error:
            endpoint = without_userinfo(self._client.meta.endpoint_url)
            raise BucketNotFound(
                f"there is no bucket {self._bucket!r} at {endpoint}: create it, or correct the uri or AWS_ENDPOINT_URL"
            ) from error

    def _is_there(self, info: ObjectInfo) -> bool:
        try:
            return self.head(info.key) == info
        except ObjectNotFound:
            return False

    def _put_in_parts(self, key: str, data: memoryview) -> ObjectInfo:
        part_bytes = _ONE_REQUEST_BYTES // 4
        upload_id = self.create_upload(key)

        def upload(offset: int) -> str:
            part = data[offset : offset + part_bytes]
            return self.upload_part(key, upload_id, number=offset // part_bytes + 1, offset=offset, data=part)

        try:
            with ThreadPoolExecutor(_UPLOAD_THREADS) as pool:
                etags = list(pool.map(carried(upload), range(0, len(data), part_bytes)))
            return self.complete_upload(key, upload_id, etags)
        except StorageError:
            with suppress(StorageError):  # the first error is the one that says why
                self.abort_upload(key, upload_id)
            raise

    def _asked(self, key: str, etag: str | None, byte_range: str = "") -> "GetObjectRequestTypeDef":
        """The object that a request is for, which one it must be, and which bytes of it."""
        asked: GetObjectRequestTypeDef = {"Bucket": self._bucket, "Key": self._full(key)}
        if etag is not None:
            asked["IfMatch"] = f'"{etag}"'
        if byte_range:
            asked["Range"] = byte_range
        return asked

    def _check_range(
        self, key: str, reply: "GetObjectOutputTypeDef", start: int, length: int, etag: str | None
    ) -> None:
        """boto3 takes any range for the one asked for, and not every server honours If-Match."""
        place = self._place(key)
        self._check_etag(key, reply, etag)
        sent = _CONTENT_RANGE.fullmatch(reply.get("ContentRange", ""))
        if sent is None:
            raise StoreUnreachable(f"{place}: the server does not serve ranges of bytes; use another one")
        if sent[3] != "*" and int(sent[3]) < start + length:
            raise SourceChanged(
                f"{place} ends before byte {start + length}: it was truncated, or its index is wrong"
            )
        if (int(sent[1]), int(sent[2])) != (start, start + length - 1) or reply["ContentLength"] != length:
            raise StoreUnreachable(
                f"{place}: the answer does not hold the bytes that were asked for: damaged on the way; try again"
            )

    def _check_etag(
        self, key: str, reply: "GetObjectOutputTypeDef | HeadObjectOutputTypeDef", etag: str | None
    ) -> None:
        """Not every server honours If-Match."""
        if etag is not None and reply["ETag"].strip('"') != etag:
            raise SourceChanged(f"{self._place(key)} has changed since this run planned with it: run again")

    def _create(self, key: str, data: bytes) -> bool:
        """Whether a conditional write was accepted. Raises ClientError for anything but "there is one"."""
        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._full(key),
                Body=body_of(data),
                ChecksumCRC32=_checksum(zlib.crc32(data)),
                IfNoneMatch="*",
            )
        except ClientError as error:
            if error_code(error) in ("PreconditionFailed", "412"):
                return False
            raise
        return True


def _checksum(crc32: int) -> str:
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()


def _etag_of_parts(parts: Sequence[Part]) -> str:
    """The etag of the whole as S3 makes it of MD5s; of other etags, one that no object has."""
    try:
        digests = b"".join(bytes.fromhex(part.etag) for part in parts)
    except ValueError:
        return ""
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
