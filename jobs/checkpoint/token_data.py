"""Sequences of tokens from data shards, for the tasks that run a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fleetpress.compression.batches import evenly
from fleetpress.compression.decoder.passage import Batch

from ..errors import ModelError
from ..programs.materials import shard_arrays
from ..runs.figures import sized

IDS, MASK = "input_ids", "attention_mask"
_COPIES = 4  # of a chunk's hidden states that are there at once: read, passing, stored, and what a block makes of them


def token_batch(uri: str, places: Sequence[Mapping[str, Any]], quota: int) -> Batch | None:
    """The sequences `from`..`to` of the `quota` that are taken of each shard, evenly spread; None if there are none.

    Raises ModelError for arrays that are no tokens, and shards with sequences of another length.
    """
    taken = []
    for place in places:
        chosen = evenly(_arrays(place), quota)
        taken.append({name: value[place["from"] : place["to"]] for name, value in chosen.items()})
    filled = [value for value in taken if len(value[IDS])]
    lengths = {value[IDS].shape[1] for value in filled}
    if len(lengths) > 1:
        raise ModelError(
            f"{uri}: the shards of its data hold sequences of {' and '.join(map(str, sorted(lengths)))} tokens; "
            "write all shards of a data set alike, padded with an attention_mask"
        )
    if not filled:
        return None
    ids, mask = (torch.cat([value[name] for value in filled]) for name in (IDS, MASK))
    return Batch(input_ids=ids, attention_mask=None if bool(mask.all()) else mask)


def states_bytes(positions: int, width: int) -> int:
    """What the hidden states of so many tokens take, with all copies that are there at once."""
    return _COPIES * 4 * positions * width


def check_room(uri: str, sequences: int, tokens: int, width: int, memory_bytes: int) -> None:
    """Raises ModelError if the hidden states of a chunk alone take more than the task may use."""
    needed = states_bytes(sequences * tokens, width)
    if needed > memory_bytes:
        raise ModelError(
            f"{uri}: {sequences} sequences of {tokens} tokens need {needed} bytes "
            f"({sized(needed)}) at once, more than the {memory_bytes} of resources.memory_per_task; "
            "lower `calibrate: {batch_size: ...}`, or raise it"
        )


def _arrays(place: Mapping[str, Any]) -> dict[str, Tensor]:
    where = f"{place['root']}/{place['path']}"
    arrays = shard_arrays(place)
    ids, mask = arrays.get(IDS), arrays.get(MASK)
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        found = (
            ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(arrays.items())) or "nothing"
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
    return {IDS: ids.long(), MASK: mask.long()}
