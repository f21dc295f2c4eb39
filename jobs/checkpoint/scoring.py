"""The step `score`: a span of held-out sequences through the whole model, one block after the other."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fleetpress.compression.decoder.passage import Batch, advanced, check_independent, embedded, scores
from fleetpress.compression.decoder.skeleton import Skeleton, require_transformers
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.metrics import METRICS, Sums
from fleetpress.compression.treatment import KEPT
from fleetpress.storage.artifact import artifact_key
from fleetpress.storage.checkpoint import Checkpoint
from fleetpress.storage.store import open_store

from ..errors import ModelError
from ..handover import Payload
from ..tasks import StepResult
from ..threads import use_one_thread
from .choice import choose
from .layout import Item, item_at, plan_shards, stored_bytes
from .memory import LIBRARIES_BYTES, TORCH_BYTES, TRANSFORMERS_BYTES
from .quality import SCORED_TOKENS, run_bytes
from .steps import opened
from .token_data import check_room, states_bytes, token_batch
from .weights import SourceTensors, matrix_of

_NO_TOKEN = -100  # what metrics leave out


def score(payload: Payload) -> StepResult:
    """Sums of the metric for every sequence alone, of the model before or after; of the latter with its new weights."""
    use_one_thread()
    try:
        return StepResult(result={"sums": _sums(payload)})
    except CompressionError as error:
        raise ModelError(f"{payload['uri']}: {error}") from None


def _sums(payload: Payload) -> list[Sums]:
    require_transformers()
    uri, memory_bytes = payload["uri"], payload["memory_bytes"]
    read = [token_batch(uri, places, payload["quota"]) for places in payload["samples"]]
    batches = [batch for batch in read if batch is not None]
    if not batches:
        return []
    checkpoint = opened(payload)
    source = SourceTensors(
        open_store(checkpoint.root), [item_at(name, at) for name, at in checkpoint.tensors.items()]
    )
    if payload["side"] == "after":
        items = choose(checkpoint, payload["recipe"]).items
        source.renew([item for item in items if item.treatment != KEPT], _Published(payload, items).read)
    skeleton = Skeleton(checkpoint.config or {}, source.names, source.read, source.rows)
    for batch in batches:
        check_room(uri, len(batch), batch.input_ids.shape[1], skeleton.width, memory_bytes)
    check_independent(skeleton, Batch(input_ids=batches[0].input_ids[:1, :8]))
    room = memory_bytes - _weight_bytes(checkpoint, skeleton)
    found = [
        sums
        for together in _groups(batches, skeleton.width, room)
        for sums in _scored(skeleton, source, together, payload["metric"])
    ]
    skeleton.close()
    return found


def _scored(
    skeleton: Skeleton, source: SourceTensors, batches: Sequence[Batch], metric: str
) -> Iterator[Sums]:
    """Sums of every sequence of some chunks, for which each block is loaded once."""
    skeleton.embed_only(torch.cat([batch.input_ids.flatten() for batch in batches]))
    parts = [part for batch in batches for _, part in batch.parts()]
    hidden = [embedded(skeleton, part) for part in parts]
    skeleton.embed_nothing()
    for index in range(len(skeleton.blocks)):
        skeleton.fill(index, source.read(skeleton.names_of(index)))
        for place, part in enumerate(parts):
            hidden[place] = advanced(skeleton, index, part, hidden[place])
        skeleton.empty(index)
    for part, states in zip(parts, hidden, strict=True):
        yield from _measured(skeleton, part, states, metric)


def _groups(batches: Sequence[Batch], width: int, room: int) -> Iterator[list[Batch]]:
    """Chunks in runs whose hidden states, and one chunk's at work, fit into `room` bytes; one at least.

    Every sequence is scored alone, so what comes out does not depend on it.
    """
    working = max(states_bytes(batch.input_ids.numel(), width) for batch in batches)
    run: list[Batch] = []
    for batch in batches:
        kept = sum(4 * width * one.input_ids.numel() for one in (*run, batch))
        if run and working + kept > room:
            yield run
            run = []
        run.append(batch)
    yield run


def _weight_bytes(checkpoint: Checkpoint, skeleton: Skeleton) -> int:
    """What is there beside hidden states at most: libraries, and a block or another tensor."""
    blocks = [skeleton.names_of(index) for index in range(len(skeleton.blocks))]
    largest = max(
        *(run_bytes(at) for at in checkpoint.tensors.values()),
        *(sum(run_bytes(checkpoint.tensors[name]) for name in names) for names in blocks),
    )
    return LIBRARIES_BYTES + TORCH_BYTES + TRANSFORMERS_BYTES + largest


class _Published:
    """The matrices that were changed, as they lie in the artifact's shards: read, not made again."""

    def __init__(self, payload: Payload, items: Sequence[Item]) -> None:
        self._store = open_store(payload["output"])
        artifact = payload["model"]["name"], payload["artifact"]
        self._places = {
            tensor.name: (artifact_key(*artifact, shard.path), offset)
            for shard in plan_shards(items)
            for tensor, offset in zip(shard.tensors, shard.offsets, strict=True)
        }

    def read(self, item: Item) -> Tensor:
        """What stands for it, decoded."""
        parts = []
        for stored in item.stored:
            key, offset = self._places[stored.name]
            size = stored_bytes(stored)
            parts.append(self._store.get_range(key, offset, size) if size else b"")
        return matrix_of(item, parts)


def _measured(skeleton: Skeleton, batch: Batch, hidden: Tensor, metric: str) -> list[Sums]:
    """The metric's sums of each sequence; scores of many tokens are large, so some come at a time.

    What follows the last block looks at every token alone. The last one of a run is the first one of the next: each run
    is measured by how well it foretells its tokens after the first.
    """
    rule, found = METRICS[metric], []
    kept = batch.attention_mask
    targets = batch.input_ids if kept is None else batch.input_ids.masked_fill(kept == 0, _NO_TOKEN)
    for index in range(len(batch)):
        sums = rule.start()
        for start in range(0, max(1, targets.shape[1] - 1), SCORED_TOKENS):
            at = slice(index, index + 1), slice(start, start + SCORED_TOKENS + 1)
            logits = scores(skeleton, Batch(input_ids=batch.input_ids[at]), hidden[at])
            rule.update(sums, logits, targets[at])
        found.append(sums)
    return found
