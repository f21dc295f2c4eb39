"""A checkpoint's shards as tasks: open?, convert*, finish*, assemble. What travels is small and says everything."""

from collections.abc import Mapping, Sequence
from typing import Any

from fleetpress.compression.treatment import Treatment
from fleetpress.storage.safetensors_header import LENGTH_BYTES

from ..digests import digest
from ..errors import ModelError
from ..tasks import Task
from .layout import Item, Piece, PlannedShard, PlannedTask
from .memory import block_bytes, task_memory


def checkpoint_tasks(
    shards: Sequence[PlannedShard],
    *,
    name: str,
    artifact: str,
    place: Mapping[str, Any],
    memory_bytes: int,
    solvers: Mapping[str, Task] | None = None,
) -> tuple[list[Task], list[str]]:
    """The tasks before `assemble`, and the digest of the record of each shard.

    `place` is where things are (output, root, uri); it changes no digest, and neither does `memory_bytes`. `solvers`
    make what is calibrated, by item name. Raises ModelError for a task that needs more than `memory_bytes`.
    """
    made: list[Task] = []

    def add(
        kind: str, label: str, needs: Sequence[str], memory: int, facts: Mapping[str, Any], **own: Any
    ) -> Task:
        # Shards lie where the artifact will be: what is done there is not done elsewhere.
        name_of_work = digest(kind, artifact=artifact, name=name, **facts)
        task = Task(
            id=f"{name}/{label}",
            model=name,
            kind=kind,
            digest=name_of_work,
            needs=tuple(needs),
            payload={
                **place,
                "name": name,
                "artifact": artifact,
                "digest": name_of_work,
                "block_bytes": block_bytes(memory_bytes),
                **facts,
                **own,
            },
            memory_bytes=memory,
        )
        made.append(task)
        return task

    shared = {shard.path: shard.size_bytes for shard in shards if len(shard.tasks) > 1}
    opened = [add("open", "open", (), task_memory((), memory_bytes), {"shards": shared})] if shared else []
    records: list[str] = []
    for shard in shards:
        alone = len(shard.tasks) == 1
        converted = []
        for index, task in enumerate(shard.tasks):
            facts = {"shard": shard.path, "index": index, "parts": list(task.parts), "alone": alone}
            own = _convert_payload(shard, task, is_first=index == 0)
            if not alone:
                own["opened"] = opened[0].digest
            solving = {
                piece.item.name: (solvers or {})[piece.item.name]
                for piece in task.pieces
                if piece.item.treatment.calibrated
            }
            own["solved_by"] = {item: solver.digest for item, solver in solving.items()}
            needs = tuple(dict.fromkeys(solver.id for solver in solving.values()))
            needs += () if alone else (opened[0].id,)
            memory = task_memory(task.pieces, memory_bytes, task.parts, task.crumbs)
            if memory > memory_bytes:
                largest = max(task.pieces, key=lambda piece: piece.source_bytes).item.name
                raise ModelError(
                    f"{place['uri']}: {largest} needs {memory} bytes of memory, more than the {memory_bytes} of "
                    "resources.memory_per_task; raise it, or take a method that works in blocks"
                )
            converted.append(add("convert", f"convert[{len(made)}]", needs, memory, facts, **own))
        if alone:
            records.append(converted[0].digest)
            continue
        last = add(
            "finish",
            f"finish[{len(records)}]",
            [task.id for task in converted],
            task_memory((), memory_bytes, shard.tail_parts),
            {
                "shard": shard.path,
                "converted": [task.digest for task in converted],
                "parts": list(shard.tail_parts),
            },
            opened=opened[0].digest,
            shard_bytes=shard.size_bytes,
            first_part=shard.first_tail_part,
            offset_bytes=shard.size_bytes - sum(shard.tail_parts),
        )
        records.append(last.digest)
    return made, records


def _convert_payload(shard: PlannedShard, task: PlannedTask, *, is_first: bool) -> dict[str, Any]:
    return {
        "shard_bytes": shard.size_bytes,
        "header": shard.header[LENGTH_BYTES:].decode() if is_first else None,
        "first_part": task.first_part,
        "offset_bytes": task.offset_bytes,
        **pieces_to_json(task.pieces),
    }


def pieces_to_json(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Pieces as JSON values; files and treatments, which many share, stand in tables of their own."""
    files: dict[tuple[str, str], int] = {}
    treatments: dict[Treatment, int] = {}
    rows = []
    for piece in pieces:
        item = piece.item
        file = files.setdefault((item.path, item.etag), len(files))
        treatment = treatments.setdefault(item.treatment, len(treatments))
        rows.append(
            [
                item.name,
                file,
                item.offset_bytes,
                item.size_bytes,
                item.dtype,
                list(item.shape),
                treatment,
                item.layer,
                item.check,
                piece.first_row,
                piece.rows,
                list(piece.in_tail),
            ]
        )
    return {
        "files": [list(file) for file in files],
        "treatments": [treatment.as_dict() for treatment in treatments],
        "pieces": rows,
    }


def pieces_of(payload: Mapping[str, Any]) -> list[Piece]:
    """The pieces that a convert task's payload describes."""
    treatments = [Treatment.from_dict(fields) for fields in payload["treatments"]]
    pieces = []
    for name, file, offset, size, dtype, shape, treatment, layer, check, first, rows, in_tail in payload[
        "pieces"
    ]:
        path, etag = payload["files"][file]
        item = Item(
            name=name,
            path=path,
            etag=etag,
            offset_bytes=offset,
            size_bytes=size,
            dtype=dtype,
            shape=tuple(shape),
            treatment=treatments[treatment],
            layer=layer,
            check=check,
        )
        pieces.append(Piece(item=item, first_row=first, rows=rows, in_tail=tuple(in_tail)))
    return pieces
