"""The step `advance`: a chunk of sequences through one block, and what the layers of the next one read of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fleetpress.compression.batches import evenly
from fleetpress.compression.calibration import CalibrationStatistics, WeightStatistics
from fleetpress.compression.decoder.observing import observed
from fleetpress.compression.decoder.passage import Batch, advanced, check_independent, embedded
from fleetpress.compression.decoder.skeleton import Skeleton, require_transformers
from fleetpress.compression.errors import CompressionError
from fleetpress.storage.store import open_store

from ..errors import ModelError
from ..handover import Payload, record
from ..programs.materials import shard_arrays
from ..runs.figures import sized
from ..tasks import Output, StepResult
from ..threads import use_one_thread
from .spill import HIDDEN, STATISTICS, delete_spilled, read_spilled, store_spilled
from .weights import SourceTensors

_IDS, _MASK, _STATES = "input_ids", "attention_mask", "hidden"
_COPIES = 4  # of a chunk's hidden states that are there at once: read, passing, stored, and what a block makes of them


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
    source = SourceTensors(open_store(payload["root"]), payload["source"])
    skeleton = Skeleton(payload["config"], source.names, source.read, source.rows)
    _check_blocks(payload, skeleton, index)
    _check_memory(payload, batch, skeleton.width)
    parts = list(batch.parts())
    if index == 0:
        check_independent(skeleton, Batch(input_ids=batch.input_ids[:1, :8]))
        skeleton.embed_only(batch.input_ids)
        states = [embedded(skeleton, part) for _, part in parts]
        skeleton.embed_nothing()
    else:
        assert hidden is not None
        skeleton.embed_nothing()
        skeleton.fill(index - 1, source.renewed(payload, skeleton.names_of(index - 1)))
        states = [advanced(skeleton, index - 1, part, hidden[at]) for at, part in parts]
        skeleton.empty(index - 1)
        del hidden
    outputs = [_store_states(payload, batch, states)]
    groups = {}
    if payload["weights"]:
        skeleton.fill(index, source.read(skeleton.names_of(index)))
        for number, (names, inputs) in enumerate(
            observed(skeleton, index, batch, states, payload["weights"])
        ):
            seen = CalibrationStatistics(
                weights={names[0]: WeightStatistics(inputs=inputs)}, samples=len(batch)
            )
            outputs.append(store_spilled(payload, seen.to_tensors(), f".{number}{STATISTICS}"))
            groups[str(number)] = list(names)
    return StepResult(
        result={"samples": len(batch), "groups": groups, "artifact": payload["artifact"]},
        outputs=tuple(outputs),
    )


def _chunk(payload: Payload) -> tuple[Batch | None, Tensor | None]:
    """The sequences, and their hidden states as the task before left them; None for a chunk that holds none."""
    if payload["block"] == 0:
        return _tokens(payload), None
    (before,) = payload["before"]
    if not record(payload, before, proved=False).result["samples"]:
        return None, None
    found = read_spilled(payload, before, HIDDEN)
    return Batch(input_ids=found[_IDS], attention_mask=found.get(_MASK)), found[_STATES]


def _tokens(payload: Payload) -> Batch | None:
    """The chunk's sequences from the data: `quota` of every shard, evenly spread, of them those of the chunk."""
    taken: list[dict[str, Tensor]] = []
    for place in payload["samples"]:
        where = f"{place['root']}/{place['path']}"
        arrays = shard_arrays(place)
        ids, mask = arrays.get(_IDS), arrays.get(_MASK)
        if ids is None or ids.dim() != 2 or ids.is_floating_point():
            found = (
                ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(arrays.items()))
                or "nothing"
            )
            raise ModelError(
                f"{where} holds {found}; a checkpoint reads `input_ids` [samples, tokens], whole numbers, "
                "and `attention_mask` if some are padding"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ModelError(
                f"{where}: attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}; "
                "give one number a token"
            )
        mask = torch.ones_like(ids) if mask is None else mask
        chosen = evenly({_IDS: ids.long(), _MASK: mask.long()}, payload["quota"])
        taken.append({name: value[place["from"] : place["to"]] for name, value in chosen.items()})
    lengths = {value[_IDS].shape[1] for value in taken if len(value[_IDS])}
    if len(lengths) > 1:
        raise ModelError(
            f"{payload['uri']}: the shards of its data hold sequences of {' and '.join(map(str, sorted(lengths)))} "
            "tokens; write all shards of a data set alike, padded with an attention_mask"
        )
    filled = [value for value in taken if len(value[_IDS])]
    if not filled:
        return None
    ids, mask = (torch.cat([value[name] for value in filled]) for name in (_IDS, _MASK))
    return Batch(input_ids=ids, attention_mask=None if bool(mask.all()) else mask)


def _store_states(payload: Payload, batch: Batch, states: Sequence[Tensor]) -> Output:
    values = {_IDS: batch.input_ids, _STATES: torch.cat(list(states))}
    if batch.attention_mask is not None:
        values[_MASK] = batch.attention_mask
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


def _check_memory(payload: Payload, batch: Batch, width: int) -> None:
    """Raises ModelError if the chunk alone takes more than the task may use."""
    needed = _COPIES * 4 * batch.input_ids.numel() * width
    if needed > payload["memory_bytes"]:
        raise ModelError(
            f"{payload['uri']}: {len(batch)} sequences of {batch.input_ids.shape[1]} tokens need {needed} bytes "
            f"({sized(needed)}) at once, more than the {payload['memory_bytes']} of resources.memory_per_task; "
            "lower `calibrate: {batch_size: ...}`, or raise it"
        )
