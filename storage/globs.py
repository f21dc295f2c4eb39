"""Patterns in uris: `*`, `?` and `[...]` in the last segments, never in the bucket or the fixed part before them."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from .errors import InvalidUri
from .uri import is_s3, normalize, without_userinfo

_GLOB = re.compile(r"[*?\[]")


def has_glob(uri: str) -> bool:
    """Whether `uri` is a pattern."""
    return _GLOB.search(uri) is not None


def split_pattern(uri: str) -> tuple[str, list[str]]:
    """The fixed place and the segments from the first pattern on; a uri without a pattern: its parent and last name.

    `s3://b/m/*/model.pt2` -> `("s3://b/m", ["*", "model.pt2"])`. Raises InvalidUri for `**` and patterns in a bucket.
    """
    segments = uri.rstrip("/").split("/")
    if "**" in segments:
        raise InvalidUri(
            f"{without_userinfo(uri)!r}: ** is not supported; write one * for every folder level"
        )
    first = next((i for i, segment in enumerate(segments) if has_glob(segment)), len(segments) - 1)
    if is_s3(uri) and first < 3:
        raise InvalidUri(
            f"{without_userinfo(uri)!r}: a bucket's name cannot be a pattern; write s3://bucket/pattern"
        )
    place = "/".join(segments[:first])
    if not place:
        place = "/" if first and uri.startswith("/") else "."
    return normalize(place), segments[first:]


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the path segments match one by one; hidden names only match patterns that start with a dot."""
    return len(parts) == len(pattern) and all(
        fnmatchcase(part, glob) and (not part.startswith(".") or glob.startswith("."))
        for part, glob in zip(parts, pattern, strict=True)
    )
