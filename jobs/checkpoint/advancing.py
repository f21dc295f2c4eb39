"""The step `advance`: a span of chunks through one block, and what the layers of the next one read of it."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fleetpress.compression.decoder.observing import Observer
from fleetpress.compression.decoder.passage import Batch, advanced, check_independent, embedded
from fleetpress.compression.decoder.skeleton import Skeleton, require_transformers
from fleetpress.compression.errors import CompressionError
from fleetpress.storage.store import open_store

from ..errors import ModelError
from ..handover import Payload, record
from ..tasks import Output, StepResult
from ..threads import use_one_thread
from .layout import Item
from .spill import HIDDEN, STATISTICS, delete_spilled, read_spilled, spilled, store_spilled
from .tasks import pieces_of
from .token_data import IDS, MASK, check_room, states_bytes, token_batch
from .weights import SourceTensors, solved_matrix

_STATES = "hidden"
_Chunk = tuple[int, Batch, Tensor]  # its number in the span, its sequences and their hidden states


def advance(payload: Payload) -> StepResult:
    """Hidden states of a span that enter block `block`, chunk by chunk, and statistics of what its chosen layers read.

    Those of the first block come from the tokens; all others have passed the block before, with its new weights. Each
    block is loaded once. The record says how large each chunk is ([sequences, tokens]), and under which number the
    statistics of which weights lie: {number: [names]}.
    """
    use_one_thread()
    delete_spilled(payload, payload["used_up"])
    try:
        return _Span(payload).run()
    except CompressionError as error:
        raise ModelError(f"{payload['uri']}: {error}") from None


class _Span:
    """One task: nothing but one chunk's hidden states, one or two blocks and the statistics is there at once."""

    def __init__(self, payload: Payload) -> None:
        require_transformers()
        self._payload, self._index = payload, payload["block"]
        if self._index:
            (before,) = payload["before"]
            self._before = record(payload, before)
            self._sizes = [(int(count), int(tokens)) for count, tokens in self._before.result["chunks"]]
        else:
            uri, quota = payload["uri"], payload["quota"]
            self._batches = [token_batch(uri, places, quota) for places in payload["samples"]]
            shapes = [() if batch is None else batch.input_ids.shape for batch in self._batches]
            self._sizes = [(shape[0], shape[1]) if shape else (0, 0) for shape in shapes]
        self._outputs: dict[int, Output] = {}  # hidden states by the number of the chunk

    def run(self) -> StepResult:
        """Pass the block before, then look at this one; at once where both fit into memory."""
        result = {"chunks": self._sizes, "groups": {}, "artifact": self._payload["artifact"]}
        if not any(count for count, _ in self._sizes):
            return StepResult(result=result)
        items = [piece.item for piece in pieces_of(self._payload["source"])]
        self._source = SourceTensors(open_store(self._payload["root"]), items)
        solved = [piece.item for piece in pieces_of(self._payload["solved"])]
        self._source.renew(solved, partial(_solved, self._payload))
        self._skeleton = Skeleton(
            self._payload["config"], self._source.names, self._source.read, self._source.rows
        )
        _check_blocks(self._payload, self._skeleton, self._index)
        for count, tokens in self._sizes:
            check_room(
                self._payload["uri"], count, tokens, self._skeleton.width, self._payload["memory_bytes"]
            )
        observer: Observer | None = None
        watched = bool(self._payload["weights"])
        if watched and self._fits():
            observer = self._observer()
        for chunk in self._entering():
            self._store(*chunk)
            if observer is not None:
                _see(observer, chunk)
        if watched and observer is None:
            observer = self._observer()
            for number, output in self._outputs.items():
                _see(observer, _chunk(self._payload, number, output))
        self._skeleton.close()
        groups: dict[str, list[str]] = {}
        statistics = []
        for names, tensors in () if observer is None else observer.found():
            statistics.append(store_spilled(self._payload, tensors, f".{len(groups)}{STATISTICS}"))
            groups[str(len(groups))] = list(names)
        return StepResult(result={**result, "groups": groups}, outputs=(*self._outputs.values(), *statistics))

    def _fits(self) -> bool:
        """Whether the block before, or the embedding, may stay while the next one is looked at."""
        states = max(states_bytes(count * tokens, self._skeleton.width) for count, tokens in self._sizes)
        kept = 0
        if not self._index:
            kept = 4 * self._skeleton.width * len(torch.unique(self._ids()))
        both: int = self._payload["both_bytes"]
        most: int = self._payload["memory_bytes"]
        return both + kept + states <= most

    def _observer(self) -> Observer:
        self._skeleton.fill(self._index, self._source.read(self._skeleton.names_of(self._index)))
        return Observer(self._skeleton, self._index, self._payload["weights"])

    def _entering(self) -> Iterator[_Chunk]:
        """Every chunk that holds sequences, with the hidden states that enter the block."""
        skeleton, before = self._skeleton, self._index - 1
        if self._index == 0:
            first = next(batch for batch in self._batches if batch is not None)
            check_independent(skeleton, Batch(input_ids=first.input_ids[:1, :8]))
            skeleton.embed_only(self._ids())
            for number, batch in enumerate(self._batches):
                if batch is not None:
                    yield number, batch, torch.cat([embedded(skeleton, part) for _, part in batch.parts()])
            skeleton.embed_nothing()
            return
        skeleton.embed_nothing()
        skeleton.fill(before, self._source.read(skeleton.names_of(before)))
        for number, (count, _) in enumerate(self._sizes):
            if count:
                _, batch, hidden = _chunk(self._payload, number, spilled(self._before, f".{number}{HIDDEN}"))
                hidden = torch.cat(
                    [advanced(skeleton, before, part, hidden[at]) for at, part in batch.parts()]
                )
                yield number, batch, hidden
        skeleton.empty(before)

    def _ids(self) -> Tensor:
        return torch.cat([batch.input_ids.flatten() for batch in self._batches if batch is not None])

    def _store(self, number: int, batch: Batch, states: Tensor) -> None:
        values = {IDS: batch.input_ids, _STATES: states}
        if batch.attention_mask is not None:
            values[MASK] = batch.attention_mask
        self._outputs[number] = store_spilled(self._payload, values, f".{number}{HIDDEN}")


def _see(observer: Observer, chunk: _Chunk) -> None:
    _, batch, states = chunk
    observer.see(batch, [states[at] for at, _ in batch.parts()])


def _chunk(payload: Payload, number: int, output: Output) -> _Chunk:
    """A chunk as a task has left it; in memory of torch's own, as if it had just been computed."""
    found = read_spilled(payload, output)
    return number, Batch(input_ids=found[IDS], attention_mask=found.get(MASK)), found[_STATES].clone()


def _solved(payload: Payload, item: Item) -> Tensor:
    """The matrix that a task has made of it."""
    return solved_matrix(payload, item, payload["solved_by"][item.name])


def _check_blocks(payload: Payload, skeleton: Skeleton, index: int) -> None:
    """Raises ModelError if the model's blocks are others than the plan took them for, by the names of tensors."""
    names = {piece[0] for piece in payload["source"]["pieces"]}
    planned = {name for name in names if name.startswith(f"{payload['path']}{index}.")}
    if payload["blocks"] != len(skeleton.blocks) or not planned & set(skeleton.names_of(index)):
        raise ModelError(
            f"{payload['uri']}: by its tensors it has {payload['blocks']} blocks {payload['path']}*, by its config "
            f"{len(skeleton.blocks)}; take a method that needs no data, or export the model to a program (.pt2)"
        )
