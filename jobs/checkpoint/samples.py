"""Which sequences of which shards a task works on: told before any is read, and the same on any number of workers."""

from collections.abc import Mapping, Sequence
from typing import Any

Shard = Mapping[str, Any]  # a file of data as payloads name it: root, path, etag, bytes
SampleRange = tuple[Shard, int, int]  # samples from..to of those that are taken of a shard


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
