"""The step `solve`: some matrices of a block, zeroed and quantized with what their layers read of all chunks."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.decoder.solving import solved
from fleetpress.compression.errors import CompressionError
from fleetpress.storage.store import open_store

from ..errors import ModelError
from ..handover import Payload, beside, record
from ..tasks import Output, StepResult
from ..threads import use_one_thread
from .inbound import Received
from .layout import Item
from .spill import SOLVED, STATISTICS, read_spilled, spilled
from .tasks import pieces_of
from .weights import read_item


def solve(payload: Payload) -> StepResult:
    """Solve the payload's matrices; the tensors that stand for them are stored one after the other.

    The record tells where they lie, the squares of weights and errors, and the methods that were used.
    """
    use_one_thread()
    items = [piece.item for piece in pieces_of(payload["items"])]
    source = Received(open_store(payload["root"]), payload["items"]["files"])
    observed = _Observed(payload)
    key = beside(payload["digest"], SOLVED)
    bodies: list[bytes] = []
    parts: dict[str, list[tuple[int, int, int]]] = {}
    sums: dict[str, tuple[float, float]] = {}
    methods: dict[str, str] = {}
    offset = 0
    for item in items:
        try:
            made = solved(item.name, read_item(source, item), item.treatment, observed.inputs_of(item))
        except CompressionError as error:
            raise ModelError(f"{payload['uri']}: {error}") from None
        parts[item.name] = []
        for stored in item.stored:
            data = _bytes(made.tensors[stored.name])
            parts[item.name].append((offset, len(data), zlib.crc32(data)))
            bodies.append(data)
            offset += len(data)
        if item.layer is not None:
            sums[item.layer] = made.signal, made.noise
            methods[item.layer] = ", ".join(made.methods)
    body = b"".join(bodies)
    open_store(payload["output"]).put(key, body)
    return StepResult(
        result={
            "parts": parts,
            "sums": sums,
            "methods": methods,
            "received": source.ranges(),
            "artifact": payload["artifact"],
        },
        outputs=(Output(key=key, bytes=len(body), sha256=hashlib.sha256(body).hexdigest()),),
    )


class _Observed:
    """What the layers read, over all spans in their order; those of the last layer are kept for its neighbours."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._records = [record(payload, digest) for digest in payload["observed"]]
        if not any(samples for made in self._records for samples, _ in made.result["chunks"]):
            raise ModelError(
                f"{payload['uri']}: its train data hold no sample; give at least one sequence of `input_ids`"
            )
        self._last: tuple[Any, InputStatistics | None] = (None, None)

    def inputs_of(self, item: Item) -> InputStatistics | None:
        """Statistics of what the item's layer reads; None if none of its inputs was seen."""
        places = [
            (made.digest, number)
            for made in self._records
            for number, names in made.result["groups"].items()
            if item.name in names
        ]
        if places != self._last[0]:
            self._last = (None, None)  # not both at once
            found = InputStatistics.summed(self._parts(places)) if places else None
            self._last = places, found
        return self._last[1]

    def _parts(self, places: Sequence[tuple[str, str]]) -> Iterator[dict[str, Tensor]]:
        made = {one.digest: one for one in self._records}
        for digest, number in places:
            yield read_spilled(self._payload, spilled(made[digest], f".{number}{STATISTICS}"))


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
