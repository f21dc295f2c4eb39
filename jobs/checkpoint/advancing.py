"""The step `advance`: a chunk of sequences through one block, and what the layers of the next one read of it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fleetpress.compression.calibration import CalibrationStatistics, WeightStatistics
from fleetpress.compression.decoder.observing import observed
from fleetpress.compression.decoder.passage import Batch, advanced, check_independent, embedded
from fleetpress.compression.decoder.skeleton import Skeleton, require_transformers
from fleetpress.compression.errors import CompressionError
from fleetpress.storage.store import open_store

from ..errors import ModelError
from ..handover import Payload, record
from ..tasks import Output, StepResult
from ..threads import use_one_thread
from .layout import Item
from .spill import HIDDEN, STATISTICS, delete_spilled, read_spilled, store_spilled
from .tasks import pieces_of
from .token_data import IDS, MASK, check_room, token_batch
from .weights import SourceTensors, solved_matrix

_STATES = "hidden"


def advance(payload: Payload) -> StepResult:
    """Hidden states of a chunk that enter block `block`, stored, and statistics of what its chosen layers read of them.

    Those of the first block come from the tokens; all others have passed the block before, with its new weights. The
    record says under which number the statistics of which weights lie: {number: [names]}.
    """
    use_one_thread()
    delete_spilled(payload, payload["used_up"])
    try:
        return _advanced(payload)
    except CompressionError as error:
        raise ModelError(f"{payload['uri']}: {error}") from None


def _advanced(payload: Payload) -> StepResult:
    require_transformers()
    index = payload["block"]
    batch, hidden = _chunk(payload)
    if batch is None:
        return StepResult(result={"samples": 0, "groups": {}, "artifact": payload["artifact"]})
    items = [piece.item for piece in pieces_of(payload["source"])]
    source = SourceTensors(open_store(payload["root"]), items)
    source.renew((piece.item for piece in pieces_of(payload["solved"])), partial(_solved, payload))
    skeleton = Skeleton(payload["config"], source.names, source.read, source.rows)
    _check_blocks(payload, skeleton, index)
    check_room(payload["uri"], batch, skeleton.width, payload["memory_bytes"])
    parts = list(batch.parts())
    if index == 0:
        check_independent(skeleton, Batch(input_ids=batch.input_ids[:1, :8]))
        skeleton.embed_only(batch.input_ids)
        states = [embedded(skeleton, part) for _, part in parts]
        skeleton.embed_nothing()
    else:
        assert hidden is not None
        skeleton.embed_nothing()
        skeleton.fill(index - 1, source.read(skeleton.names_of(index - 1)))
        states = [advanced(skeleton, index - 1, part, hidden[at]) for at, part in parts]
        skeleton.empty(index - 1)
        del hidden
    outputs = [_store_states(payload, batch, states)]
    groups = {}
    if payload["weights"]:
        skeleton.fill(index, source.read(skeleton.names_of(index)))
        found = observed(skeleton, index, batch, states, payload["weights"])
        skeleton.close()
        for number, (names, inputs) in enumerate(found):
            seen = CalibrationStatistics(
                weights={names[0]: WeightStatistics(inputs=inputs)}, samples=len(batch)
            )
            outputs.append(store_spilled(payload, seen.to_tensors(), f".{number}{STATISTICS}"))
            groups[str(number)] = list(names)
    return StepResult(
        result={"samples": len(batch), "groups": groups, "artifact": payload["artifact"]},
        outputs=tuple(outputs),
    )


def _solved(payload: Payload, item: Item, weight: Tensor) -> Tensor:
    """The matrix that a task has made of `weight`."""
    return solved_matrix(payload, item, payload["solved_by"][item.name])


def _chunk(payload: Payload) -> tuple[Batch | None, Tensor | None]:
    """The sequences, and their hidden states as the task before left them; None for a chunk that holds none."""
    if payload["block"] == 0:
        return token_batch(payload["uri"], payload["samples"], payload["quota"]), None
    (before,) = payload["before"]
    if not record(payload, before, proved=False).result["samples"]:
        return None, None
    found = read_spilled(payload, before, HIDDEN)
    return Batch(input_ids=found[IDS], attention_mask=found.get(MASK)), found[_STATES]


def _store_states(payload: Payload, batch: Batch, states: Sequence[Tensor]) -> Output:
    values = {IDS: batch.input_ids, _STATES: torch.cat(list(states))}
    if batch.attention_mask is not None:
        values[MASK] = batch.attention_mask
    return store_spilled(payload, values, HIDDEN)


def _check_blocks(payload: Payload, skeleton: Skeleton, index: int) -> None:
    """Raises ModelError if the model's blocks are others than the plan took them for, by the names of tensors."""
    names = {piece[0] for piece in payload["source"]["pieces"]}
    planned = {name for name in names if name.startswith(f"{payload['path']}{index}.")}
    if payload["blocks"] != len(skeleton.blocks) or not planned & set(skeleton.names_of(index)):
        raise ModelError(
            f"{payload['uri']}: by its tensors it has {payload['blocks']} blocks {payload['path']}*, by its config "
            f"{len(skeleton.blocks)}; take a method that needs no data, or export the model to a program (.pt2)"
        )
