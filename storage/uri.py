"""Names of places: `s3://bucket/prefix`, `file:///folder`, or a plain path, and the object keys below them.

A key is relative to its store, its segments are separated by `/`, and it can never leave the store's root.
"""

import posixpath
import re
from urllib.parse import unquote, urlsplit

from .errors import InvalidUri

_S3 = "s3://"
_FILE = "file:"
_NO_PATH = re.compile(r"[a-z][a-z0-9+.-]*:/|s3[an]?:|s3//", re.IGNORECASE)  # s3:/bucket is no folder `s3:`
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"  # would break a message into lines, or a terminal
_UNPRINTABLE = re.compile(f"[{_CONTROL}]")
_UNUSABLE = re.compile(rf"[{_CONTROL}\\]")
_LONGEST_KEY_BYTES = 1024  # S3's own limit
_ALMOST_S3 = (  # how other tools write what is meant by s3://
    re.compile(r"(?:s3[an]?:/*|s3//)(.+)", re.IGNORECASE),
    re.compile(r"arn:[a-z-]+:s3:::(.+)"),
    re.compile(r"https?://s3[.-][a-z0-9.-]*amazonaws\.com(?:\.cn)?/(.+)"),
)
_HOST_OF_BUCKET = re.compile(r"https?://([a-z0-9.-]+?)\.s3[.-][a-z0-9.-]*amazonaws\.com(?:\.cn)?/?(.*)")
_USERINFO = re.compile(r"(?<=://)[^/]*@")


def is_s3(uri: str) -> bool:
    """Whether `uri` names a place in an object store (and not a folder)."""
    return uri.startswith(_S3)


def without_userinfo(uri: str) -> str:
    """The uri as a message may repeat it: without the `user:password@` that does not belong into it."""
    return _USERINFO.sub("", uri)


def normalize(uri: str) -> str:
    """One spelling per place: no trailing `/`, `file:` uris as paths, `.` and `..` of paths resolved.

    Raises InvalidUri for other schemes, bad bucket names, prefixes that are not valid keys, and control characters.
    """
    if is_s3(uri):
        bucket, prefix = bucket_and_prefix(uri)
        return f"{_S3}{bucket}/{prefix}" if prefix else f"{_S3}{bucket}"
    path = _path_of_file_uri(uri) if uri.startswith(_FILE) else uri
    if not path or _NO_PATH.match(path) or path.startswith("arn:") or _UNPRINTABLE.search(path):
        raise InvalidUri(f"{without_userinfo(uri)!r} is no place to read or write: {_remedy(path)}")
    # POSIX gives exactly two leading slashes a meaning of their own; here they name the same folder.
    return re.sub(r"^//(?!/)", "/", posixpath.normpath(path))


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b/` -> `("bucket", "a/b")`. Raises InvalidUri."""
    bucket, _, prefix = uri.removeprefix(_S3).partition("/")
    prefix = prefix.removesuffix("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidUri(f"{without_userinfo(uri)!r} has no valid bucket name: expected s3://bucket/prefix")
    if prefix:
        validate_key(prefix)
    return bucket, prefix


def split(uri: str) -> tuple[str, str]:
    """The store that holds `uri`, and the key in it: the parent folder or prefix, and the last name.

    `s3://b/m/a.pt2` -> `("s3://b/m", "a.pt2")`, `m/a.pt2` -> `("m", "a.pt2")`, `a.pt2` -> `(".", "a.pt2")`.
    A bucket, `/`, `.` or `..` has no last name: its key is empty.
    """
    place = normalize(uri)
    scheme, path = (_S3, place.removeprefix(_S3)) if is_s3(place) else ("", place)
    parent, name = posixpath.split(path)
    if not name or name in (".", "..") or (scheme and not parent):
        return place, ""
    return scheme + (parent or "."), name


def join(uri: str, *parts: str) -> str:
    """The place of key `parts[0]/parts[1]/...` below `uri`. Raises InvalidUri if a part is no valid key."""
    place = normalize(uri)
    for part in parts:
        place = f"{place.rstrip('/')}/{validate_key(part)}"
    return normalize(place)


def basename(uri: str) -> str:
    """The last name of `uri`; of a bucket, the bucket."""
    return posixpath.basename(normalize(uri))


def validate_key(key: str) -> str:
    """`key` itself, if it is a usable object key.

    Raises InvalidUri for an empty key, empty, `.` or `..` segments, a leading or trailing `/`, backslashes, control
    characters, characters without a UTF-8 form, and more than 1024 bytes.
    """
    if not key or any(segment in ("", ".", "..") for segment in key.split("/")):
        raise InvalidUri(
            f"object key {key!r}: names separated by single '/' expected, none of them '.' or '..'"
        )
    if _UNUSABLE.search(key):
        raise InvalidUri(f"object key {key!r}: control characters and backslashes are not allowed")
    if len(key.encode()) > _LONGEST_KEY_BYTES:
        raise InvalidUri(f"object key {key[:40]!r}...: longer than {_LONGEST_KEY_BYTES} bytes")
    return key


def is_valid_key(key: str) -> bool:
    """Whether `validate_key` accepts it."""
    try:
        validate_key(key)
    except InvalidUri:
        return False
    return True


def _remedy(path: str) -> str:
    if host := _HOST_OF_BUCKET.fullmatch(path):
        return f"write {_S3}{host[1]}/{host[2]}".rstrip("/")
    rest = next((found[1] for form in _ALMOST_S3 if (found := form.fullmatch(path))), None)
    if rest is not None:
        return f"write {_S3}{rest}"
    return "use s3://bucket/prefix, file:///folder or a path"


def _path_of_file_uri(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError:  # brackets that hold no IPv6 address
        parts = urlsplit("file://")
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidUri(
            f"{without_userinfo(uri)!r} names no folder of this machine: expected file:///folder"
        )
    return unquote(parts.path)
