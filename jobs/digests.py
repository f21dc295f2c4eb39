"""Digests: names made of everything that can change a result, and of nothing else.

A task's digest covers the digests of what it reads, its options, and the version of its method; never a URI, a clock,
a machine or a number of workers. Equal digests therefore mean equal bytes, wherever and whenever they were made.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from fleetpress.storage import canonical_json
from fleetpress.storage.sources import SourceFile

# Raise a version when a change of code changes the bytes, or the record, that the step gives for the same input.
VERSIONS = {
    "export": 1,
    "train": 2,
    "collect": 1,
    "calibrate": 4,
    "observe": 4,
    "sense": 6,
    "trial": 8,
    "ladder": 1,  # no step of its own: what a search publishes of its trials
    "fleet": 1,
    "equalize": 1,
    "prune": 3,
    "finetune": 2,
    "quantize": 3,
    "publish": 2,
    "advance": 2,
    "solve": 2,
    "score": 2,
    "run": 1,
    "open": 1,
    "convert": 4,
    "finish": 2,
    "assemble": 3,
}


def digest(kind: str, **facts: Any) -> str:
    """32 hexadecimal characters for a step of this kind over these facts (plain JSON values)."""
    text = canonical_json.dumps({"kind": kind, "version": VERSIONS[kind], **facts})
    return hashlib.sha256(text).hexdigest()[:32]


def contents(files: Iterable[SourceFile], *, named: bool = False) -> list[list[Any]]:
    """What identifies the content of files: etag and size, and the path where it matters to the result."""
    return [[file.path, file.etag, file.bytes] if named else [file.etag, file.bytes] for file in files]
