"""What the tasks of a calibration leave beside their records: hidden states, statistics, and matrices that are solved.

All of it is deleted when nobody needs it any more: hidden states and statistics two blocks later, so that those of two
blocks lie in the output at most, and the rest once the artifact is published.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence

from safetensors.torch import load, save
from torch import Tensor

from fleetpress.storage.store import open_store
from fleetpress.storage.uri import join

from ..errors import ModelError
from ..handover import SPILLED, Payload, beside, store_bytes
from ..ledger import Ledger
from ..tasks import Output, TaskRecord

HIDDEN, STATISTICS, SOLVED = SPILLED

Parts = Sequence[Sequence[int]]  # of each tensor that stands for a matrix: offset, bytes and CRC-32


def store_spilled(payload: Payload, values: Mapping[str, Tensor], suffix: str) -> Output:
    """Write tensors beside the record of the running task."""
    return store_bytes(payload, save({name: value.contiguous() for name, value in values.items()}), suffix)


def spilled(made: TaskRecord, suffix: str) -> Output:
    """What the task of that record has left under a suffix."""
    return next(output for output in made.outputs if output.key == beside(made.digest, suffix))


def read_spilled(payload: Payload, output: Output) -> dict[str, Tensor]:
    """Tensors that `store_spilled` wrote, their hash checked. Raises ModelError if they are something else."""
    data = open_store(payload["output"]).get(output.key)
    if hashlib.sha256(data).hexdigest() != output.sha256:
        raise _changed(payload, output.key)
    return dict(load(data))


def read_parts(payload: Payload, digest: str, parts: Parts) -> list[bytes]:
    """The bytes of the tensors that a solve task has stored for a matrix. Raises ModelError if they are others."""
    store, key = open_store(payload["output"]), beside(digest, SOLVED)
    found = []
    for offset, size, crc32 in parts:
        data = store.get_range(key, offset, size) if size else b""
        if zlib.crc32(data) != crc32:
            raise _changed(payload, key)
        found.append(data)
    return found


def delete_spilled(payload: Payload, digests: Iterable[str], *, records: bool = True) -> None:
    """Delete what tasks left, and their `records` first: without them nobody misses the rest."""
    store = open_store(payload["output"])
    for digest in digests:
        found = Ledger(store).read(digest)
        if found is None:
            continue
        if records:
            store.delete(beside(digest, ".json"))
        for output in found.outputs:
            store.delete(output.key)


def _changed(payload: Payload, key: str) -> ModelError:
    return ModelError(
        f"{join(payload['output'], key)} is not what was written (its checksum differs); delete it and run again"
    )
