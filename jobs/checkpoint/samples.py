"""Which sequences of which shards a task works on: told before any is read, and the same on any number of workers."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Shard = Mapping[str, Any]  # a file of data as payloads name it: root, path, etag, bytes
SampleRange = tuple[Shard, int, int]  # samples from..to of those that are taken of a shard
SPANS = 8  # runs of chunks: each is one task a block, with one load of the block's weights and one set of statistics


def quota_of(shards: Sequence[Shard], samples: int) -> int:
    """How many are taken of every shard."""
    return -(-samples // max(1, len(shards)))


def chunks_of(shards: Sequence[Shard], samples: int, size: int) -> list[list[SampleRange]]:
    """The places of `samples` samples, as many of every shard, in runs of `size`; a short shard leaves places empty."""
    quota = quota_of(shards, samples)
    chunks: list[list[SampleRange]] = []
    for start in range(0, quota * len(shards), size):
        stop = min(start + size, quota * len(shards))
        chunk: list[SampleRange] = []
        for index in range(start // quota, -(-stop // quota)):
            first, last = max(start, index * quota), min(stop, (index + 1) * quota)
            chunk.append((shards[index], first - index * quota, last - index * quota))
        chunks.append(chunk)
    return chunks


def spans_of(chunks: Sequence[list[SampleRange]]) -> list[list[list[SampleRange]]]:
    """The chunks in at most SPANS runs of neighbours, as even as can be: however many there are, or workers."""
    count = min(SPANS, len(chunks))
    ends = [len(chunks) * index // count for index in range(count + 1)]
    return [list(chunks[first:last]) for first, last in itertools.pairwise(ends)]


def places_of(chunk: Sequence[SampleRange]) -> list[dict[str, Any]]:
    """A chunk as payloads name it."""
    return [{**shard, "from": first, "to": last} for shard, first, last in chunk]
