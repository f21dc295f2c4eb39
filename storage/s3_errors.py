"""One table from what S3 and its client say to what this package says: where it was, what is wrong, what to do.

The server's own text is never repeated: some servers put keys and signatures into it.
"""

import contextlib
import http.client
from collections.abc import Iterator
from urllib.parse import urlsplit

import urllib3.exceptions
from botocore import exceptions as botocore_errors
from botocore.parsers import ResponseParserError

from .errors import (
    AccessDenied,
    BucketNotFound,
    InvalidUri,
    NotWritable,
    ObjectNotFound,
    SourceChanged,
    StorageError,
    StoreUnreachable,
    UploadGone,
    WriteConflict,
)
from .uri import without_userinfo

_Meaning = tuple[type[StorageError], str]

_NO_BUCKET: _Meaning = (
    BucketNotFound,
    "there is no such bucket: create it, or correct the uri or AWS_ENDPOINT_URL",
)
_NO_KEY: _Meaning = (ObjectNotFound, "there is no such object: correct the uri")
_FORBIDDEN: _Meaning = (
    AccessDenied,
    "access denied: check that these credentials (AWS_PROFILE or AWS_ACCESS_KEY_ID) may do this here; without the "
    "right to list, S3 also answers so for keys that do not exist",
)
_BAD_CREDENTIALS: _Meaning = (
    AccessDenied,
    "the credentials were refused: check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they "
    "belong to this endpoint",
)
_NO_CREDENTIALS: _Meaning = (
    AccessDenied,
    "no credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
)
_EXPIRED: _Meaning = (
    AccessDenied,
    "the credentials have expired: renew them (AWS_SESSION_TOKEN, or sign in again)",
)
_CLOCK: _Meaning = (AccessDenied, "the request was refused because this machine's clock is wrong: set it")
_REGION: _Meaning = (AccessDenied, "the bucket lies in another region: set AWS_REGION to that of the bucket")
_FROZEN: _Meaning = (AccessDenied, "the object lies in an archive storage class: restore it first")
_CHANGED: _Meaning = (SourceChanged, "the object has changed since this run planned with it: run again")
_SHORT: _Meaning = (
    SourceChanged,
    "the object ends before the bytes asked for: it was truncated, or its index is wrong",
)
_BAD_NAME: _Meaning = (InvalidUri, "the server does not accept this name: correct the uri")
_READ_ONLY: _Meaning = (NotWritable, "the server does not allow this write: use another output")
_FULL: _Meaning = (NotWritable, "the server has no room left: free some, or use another output")
_NO_UPLOAD: _Meaning = (UploadGone, "the upload was completed or aborted by someone else: run again")
_OTHER_PARTS: _Meaning = (UploadGone, "the upload's parts are not the ones that were recorded: run again")
_SMALL_PART: _Meaning = (
    NotWritable,
    "a part before the last one is smaller than the server takes (S3: 5 MiB): use another output",
)
_DAMAGED: _Meaning = (StoreUnreachable, "the bytes were damaged on their way to the server: try again")
_BUSY: _Meaning = (
    StoreUnreachable,
    "the server asked for fewer requests until the retries ran out: try again later",
)
_RACE: _Meaning = (WriteConflict, "another write of the same name is under way: try again")
_FAILED: _Meaning = (
    StoreUnreachable,
    "the server had an error of its own until the retries ran out: try again later",
)
_DOWN: _Meaning = (StoreUnreachable, "the server does not answer: check AWS_ENDPOINT_URL and the network")
_NO_TLS: _Meaning = (
    StoreUnreachable,
    "no encrypted connection could be made: write http:// in AWS_ENDPOINT_URL if the server speaks plain HTTP, or "
    "name the certificate it is signed with in AWS_CA_BUNDLE",
)
_WANTS_TLS: _Meaning = (
    StoreUnreachable,
    "the server ends the connection: try again, and write https:// in AWS_ENDPOINT_URL if it speaks that",
)
_NO_S3: _Meaning = (
    StoreUnreachable,
    "what answers there is no S3 server, or wants https://: check the port and the path of AWS_ENDPOINT_URL",
)
_NO_REGION: _Meaning = (
    StoreUnreachable,
    "AWS_REGION or AWS_DEFAULT_REGION names no region: write one such as eu-central-1",
)
_CUT: _Meaning = (StoreUnreachable, "the connection broke before the whole answer was here: try again")
_CHECKSUM: _Meaning = (
    StoreUnreachable,
    "the bytes do not match the server's checksum: damaged on the way, or a server that sends the whole object's "
    "checksum with a part of it (then set AWS_RESPONSE_CHECKSUM_VALIDATION=when_required)",
)

_BY_CODE: dict[str, _Meaning] = {
    "NoSuchBucket": _NO_BUCKET,
    "NoSuchKey": _NO_KEY,
    "NotFound": _NO_KEY,
    "404": _NO_KEY,
    "AccessDenied": _FORBIDDEN,
    "AllAccessDisabled": _FORBIDDEN,
    "Forbidden": _FORBIDDEN,
    "401": _BAD_CREDENTIALS,
    "403": _FORBIDDEN,
    "InvalidAccessKeyId": _BAD_CREDENTIALS,
    "SignatureDoesNotMatch": _BAD_CREDENTIALS,
    "InvalidToken": _BAD_CREDENTIALS,
    "400": (  # a HEAD has no body to name the reason, and these are the usual ones
        AccessDenied,
        "the credentials were refused: they are wrong or have expired (check AWS_PROFILE, or AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN)",
    ),
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": _CLOCK,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "InvalidObjectState": _FROZEN,
    "PreconditionFailed": _CHANGED,
    "412": _CHANGED,
    "InvalidRange": _SHORT,
    "416": _SHORT,
    "InvalidBucketName": _BAD_NAME,
    "KeyTooLongError": _BAD_NAME,
    "MethodNotAllowed": _READ_ONLY,
    "405": _READ_ONLY,
    "NotImplemented": (
        NotWritable,
        "the server does not know this kind of request: use one with conditional writes",
    ),
    "QuotaExceeded": _FULL,
    "507": _FULL,
    "NoSuchUpload": _NO_UPLOAD,
    "InvalidPart": _OTHER_PARTS,
    "EntityTooSmall": _SMALL_PART,
    "BadDigest": _DAMAGED,
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "Throttling": _BUSY,
    "ThrottlingException": _BUSY,
    "RequestLimitExceeded": _BUSY,
    "TooManyRequests": _BUSY,
    "BandwidthLimitExceeded": _BUSY,
    "429": _BUSY,
    "503": _BUSY,
    "InternalError": _FAILED,
    "500": _FAILED,
    "ConditionalRequestConflict": _RACE,
    "OperationAborted": _RACE,
    "409": _RACE,
    "RequestTimeout": _CUT,
    "IncompleteBody": _CUT,
    "XAmzContentChecksumMismatch": _DAMAGED,
}

# Those that a server's own proxy answers as a web page are left out: it is busy, and no stranger.
_NOT_OF_A_PROXY = ("200", "400", "401", "403", "404", "405", "500", "501")

_BY_TYPE: tuple[tuple[tuple[type[Exception], ...], _Meaning], ...] = (
    ((botocore_errors.NoCredentialsError, botocore_errors.PartialCredentialsError), _NO_CREDENTIALS),
    (
        (botocore_errors.ProfileNotFound, botocore_errors.ConfigNotFound, botocore_errors.ConfigParseError),
        (
            AccessDenied,
            "AWS_PROFILE or the AWS configuration file names something that is not there: correct it",
        ),
    ),
    (
        (
            botocore_errors.CredentialRetrievalError,
            botocore_errors.MetadataRetrievalError,
            botocore_errors.TokenRetrievalError,
            botocore_errors.SSOError,
        ),
        (AccessDenied, "the credentials could not be fetched: sign in again, or check AWS_PROFILE"),
    ),
    (
        (botocore_errors.EndpointProviderError,),
        (StoreUnreachable, "AWS_ENDPOINT_URL is no valid address: expected http(s)://host:port"),
    ),
    ((botocore_errors.NoRegionError, botocore_errors.InvalidRegionError), _NO_REGION),
    ((botocore_errors.SSLError,), _NO_TLS),
    ((ResponseParserError,), _NO_S3),
    ((botocore_errors.ParamValidationError,), _BAD_NAME),
    ((botocore_errors.FlexibleChecksumError,), _CHECKSUM),
    (
        (
            botocore_errors.IncompleteReadError,
            botocore_errors.ResponseStreamingError,
            botocore_errors.ConnectionClosedError,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
        ),
        _CUT,
    ),
    ((botocore_errors.HTTPClientError, botocore_errors.ConnectionError, OSError), _DOWN),
)

# What botocore, and the bodies it hands out, are seen to raise; ValueError is its answer to a malformed endpoint.
_FOREIGN = (
    botocore_errors.BotoCoreError,
    botocore_errors.ClientError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)


@contextlib.contextmanager
def s3_errors(action: str, place: str, endpoint: str) -> Iterator[None]:
    """Inside, every error of the client becomes a StorageError that says `cannot <action> <place> at <endpoint>`."""
    try:
        yield
    except _FOREIGN as error:
        kind, text = _meaning(error)
        if isinstance(error, botocore_errors.ConnectionClosedError) and endpoint.startswith("http://"):
            kind, text = _WANTS_TLS
        if issubclass(kind, (ObjectNotFound, BucketNotFound)) and urlsplit(endpoint).path not in ("", "/"):
            text += "; a bucket's name belongs into the uri, not into AWS_ENDPOINT_URL"
        raise kind(f"cannot {action} {place} at {without_userinfo(endpoint)}: {text}") from error


def error_code(error: botocore_errors.ClientError) -> str:
    """The S3 error code of a reply, or its HTTP status where it has no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _meaning(error: Exception) -> _Meaning:
    if isinstance(error, botocore_errors.ClientError):
        return _meaning_of_reply(error)
    for kinds, meaning in _BY_TYPE:
        if isinstance(error, kinds):
            return meaning
    return StoreUnreachable, f"the client gave up ({type(error).__name__})"


def _meaning_of_reply(error: botocore_errors.ClientError) -> _Meaning:
    code = error_code(error)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    has_body = not error.operation_name.startswith("Head")
    if has_body and code in _NOT_OF_A_PROXY and headers.get("content-type", "").startswith("text/html"):
        return _NO_S3
    if code in _BY_CODE:
        return _BY_CODE[code]
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status in (401, 403):
        return _FORBIDDEN
    return StoreUnreachable, f"the server answered {status} {code}, also after retries"
