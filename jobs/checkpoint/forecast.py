"""What compressing a checkpoint will cost, from its plan: bytes, requests and memory, before a weight is read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fleetpress.storage.streams import ONE_PUT_BYTES

from ..tasks import Task
from .layout import PlannedShard
from .memory import block_bytes, task_memory
from .stream import requests
from .tasks import pieces_of

_RUNS = ("advance", "solve", "score")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Exact for weights: `read_bytes` of the source, `written_bytes` of shards, `read_back_bytes` of what was written.

    `source_ranges`, `uploads` (parts and single puts; each is read back once) and `crumbs` count requests; records,
    config and the other small files come on top. `memory_bytes` is the most that a task needs. `runs` are tasks that
    run the model, to calibrate or to measure it, and `run_bytes` what they read of the source on top.
    """

    shards: tuple[dict[str, Any], ...]
    tasks: int
    read_bytes: int
    written_bytes: int
    read_back_bytes: int
    source_ranges: int
    uploads: int
    crumbs: int
    memory_bytes: int
    runs: int = 0
    run_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "shards": list(self.shards)}


def forecast(
    shards: Sequence[PlannedShard], memory_bytes: int, *, planned: Sequence[Task] = (), source_bytes: int = 0
) -> Forecast:
    """The cost of making these shards under this ceiling of memory, and of the `planned` tasks that run the model."""
    tasks = [task for shard in shards for task in shard.tasks]
    passes = [
        (piece, 1 + piece.item.geometry.passes)
        for task in tasks
        for piece in task.pieces
        if not piece.item.treatment.calibrated
    ]
    spread = [shard for shard in shards if len(shard.tasks) > 1]
    size = sum(shard.size_bytes for shard in shards)
    block = block_bytes(memory_bytes)
    return Forecast(
        shards=tuple({"path": shard.path, "bytes": shard.size_bytes} for shard in shards),
        tasks=len(tasks),
        read_bytes=sum(piece.source_bytes * count for piece, count in passes),
        written_bytes=size,
        read_back_bytes=size,
        source_ranges=sum(requests(task.pieces, block) for task in tasks),
        uploads=sum(_uploads(shard) for shard in shards),
        crumbs=sum(bool(task.crumbs) for shard in spread for task in shard.tasks),
        memory_bytes=max(
            *(task_memory(task.pieces, memory_bytes, task.parts, task.crumbs) for task in tasks),
            *(task.memory_bytes for task in planned if task.kind in _RUNS),
            0,
        ),
        runs=sum(task.kind in _RUNS for task in planned),
        run_bytes=sum(_run_bytes(task, source_bytes) for task in planned if task.kind in _RUNS),
    )


def _run_bytes(task: Task, source_bytes: int) -> int:
    """What a task reads that runs the model, at most: one or two blocks, some matrices, or all of it."""
    if task.kind == "score":
        return source_bytes
    table = task.payload["source" if task.kind == "advance" else "items"]
    inside = task.payload.get("path", "") if task.payload["block"] else ""  # tokens are embedded once
    # What was solved before is read as it was solved.
    renewed = {piece[0] for piece in task.payload.get("solved", {}).get("pieces", ())}
    items = (piece.item for piece in pieces_of(table))
    return sum(item.size_bytes for item in items if item.name.startswith(inside) and item.name not in renewed)


def _uploads(shard: PlannedShard) -> int:
    if len(shard.tasks) == 1 and shard.size_bytes < ONE_PUT_BYTES:
        return 1
    return sum(len(task.parts) for task in shard.tasks) + len(shard.tail_parts)
