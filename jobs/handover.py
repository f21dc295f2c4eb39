"""What tasks hand to one another through the store: records, and bytes beside them."""

import hashlib
from collections.abc import Mapping
from typing import Any

from fleetpress.storage.sources import SourceFile
from fleetpress.storage.store import open_store

from .errors import ModelError
from .ledger import Ledger
from .tasks import Output, TaskRecord

Payload = Mapping[str, Any]

# What tasks that calibrate a checkpoint leave beside their records until it is published, and what it is.
SPILLED = {".hidden": "hidden states", ".statistics": "statistics", ".solved": "solved matrices"}


def record(payload: Payload, digest: str, *, proved: bool = True) -> TaskRecord:
    """The record of an earlier task; if `proved`, what it names is there. Raises ModelError if it has vanished."""
    ledger = Ledger(open_store(payload["output"]))
    found = ledger.find(digest) if proved else ledger.read(digest)
    if found is None:
        raise ModelError(
            f"the record {digest} of an earlier step has vanished from {payload['output']}; run again"
        )
    return found


def store_bytes(payload: Payload, data: bytes, suffix: str) -> Output:
    """Write bytes beside the record of the running task."""
    key = beside(payload["digest"], suffix)
    open_store(payload["output"]).put(key, data)
    return Output(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def beside(digest: str, suffix: str) -> str:
    """The key of bytes that lie beside a task's record."""
    return f"records/{digest}{suffix}"


def read_file(root: str, file: SourceFile) -> bytes:
    """A file of a source, pinned to the etag that the plan saw. Raises SourceChanged if it is another one now."""
    return open_store(root).get(file.path, etag=file.etag)
