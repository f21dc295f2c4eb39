"""What was probably meant by a place where nothing is: a neighbour of nearly that name, or a bucket."""

import difflib
import os
import posixpath
import re
from itertools import islice

from .globs import has_glob
from .uri import is_s3, normalize

_BARE_S3 = re.compile(r"s3/(?=[a-z0-9])")  # the others are no paths at all: uri.py
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_MOST_NEIGHBOURS = 10_000


def hint(place: str) -> str:
    """`; did you mean ...?` for a path that leads nowhere, else an empty text; reads names of folders only."""
    if is_s3(place) or place.startswith("file:"):
        return ""
    if almost := _BARE_S3.match(place):
        return f"; did you mean `s3://{place[almost.end() :]}`?"
    path = normalize(place).removeprefix(os.getcwd() + "/")
    here, _, rest = path.lstrip("/").partition("/")
    so_far = f"/{here}" if path.startswith("/") else here
    while os.path.exists(so_far) and rest:
        here, _, rest = rest.partition("/")
        so_far = f"{so_far}/{here}"
    if os.path.exists(so_far) or has_glob(here):
        return ""
    close = difflib.get_close_matches(here, _names(posixpath.dirname(so_far) or "."), n=1)
    if close:
        meant = posixpath.join(posixpath.dirname(so_far), close[0], rest).rstrip("/")
        return f"; did you mean `{meant}`?"
    if so_far == here and rest and _BUCKET.fullmatch(here):
        return f"; there is no folder `{here}` here, and a bucket is written s3://{path}"
    return ""


def _names(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, _MOST_NEIGHBOURS)]
    except OSError:
        return []
