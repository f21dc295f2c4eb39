"""The tasks that calibrate a checkpoint, block by block: hidden states advance, layers are observed, then solved.

Sequences are cut into chunks of `batch_size`, and these into at most SPANS spans, the same ones on any number of
workers. For each block, one task a span takes the hidden states through the block before with its new weights, chunk by
chunk, and adds up what the layers of this one read; then tasks of some matrices each solve them. So what is left of
statistics does not grow with the number of chunks, and a block is read by no more tasks than there are spans.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetpress.storage.checkpoint import Checkpoint, TensorLocation

from ..digests import digest
from ..errors import ModelError
from ..tasks import Task
from .block_memory import BlockMemory, block_memory
from .choice import Choice
from .layout import Item, Piece, item_at
from .samples import Shard, chunks_of, places_of, quota_of, spans_of
from .tasks import pieces_to_json

SOLVE_BYTES = 64 << 20  # of the source, that one solve task works on; a larger matrix has a task of its own


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Tasks of a calibration, the solve task of each matrix (by item name), and what is left when all is done.

    `memory_bytes` is the least that a task may use; `read_bytes` are those of the source that all of them read.
    """

    tasks: tuple[Task, ...]
    solvers: Mapping[str, Task]
    memory_bytes: int
    read_bytes: int
    blocks: int
    spans: int

    @property
    def digests(self) -> list[str]:
        """Of the records beside which something lies until the artifact is published."""
        return [task.digest for task in self.tasks]


def require_transformers(uri: str) -> None:
    """Raises ModelError where the extra that runs checkpoints is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(
            f"{uri}: a checkpoint is calibrated by running it in transformers, which is not installed; "
            "pip install 'fleetpress[hf]'"
        )


class CalibrationPlanner:
    """Grows the tasks of a choice that has `blocks`, block by block; `options` are those of the recipe's `calibrate`.

    `place` is where things are (output, root, uri); `work` is the digest of all that changes their results.
    """

    def __init__(
        self,
        choice: Choice,
        checkpoint: Checkpoint,
        shards: Sequence[Shard],
        *,
        name: str,
        artifact: str,
        work: str,
        place: Mapping[str, Any],
        options: Mapping[str, Any],
        memory_bytes: int,
    ) -> None:
        assert choice.blocks is not None
        self._blocks = choice.blocks
        self._checkpoint = checkpoint
        self._name, self._artifact, self._work, self._place = name, artifact, work, place
        self._memory_bytes = memory_bytes
        self._quota = quota_of(shards, options["samples"])
        self._spans = spans_of(chunks_of(shards, options["samples"], options["batch_size"]))
        self._items: dict[int, list[Item]] = {}
        for item in choice.items:
            if item.treatment.calibrated:
                index = self._blocks.index_of(item.name)
                assert index is not None
                self._items.setdefault(index, []).append(item)
        self._sources: dict[int | None, list[tuple[str, TensorLocation]]] = {}
        for tensor, at in checkpoint.tensors.items():
            self._sources.setdefault(self._blocks.index_of(tensor), []).append((tensor, at))
        self._tasks: list[Task] = []
        self._solvers: dict[str, Task] = {}
        self._memory: list[BlockMemory] = []
        self._read_bytes = 0

    def run(self) -> Calibration:
        """All blocks up to the last one with a layer that is calibrated.

        Raises ModelError naming the block that `memory_bytes` cannot hold.
        """
        count = max(self._items) + 1
        least = max(map(self._check_memory, range(count)))
        spans = range(len(self._spans))
        before: list[Task] = []
        old: list[Task] = []
        for index in range(count):
            solved = [self._solvers[item.name] for item in self._items.get(index - 1, ())]
            now = [
                self._advance(index, span, before[span : span + 1], solved, old[span : span + 1])
                for span in spans
            ]
            for group, items in enumerate(_groups(self._items.get(index, []))):
                self._solve(index, group, items, now)
            old, before = before, now
        return Calibration(
            tasks=tuple(self._tasks),
            solvers=self._solvers,
            memory_bytes=least,
            read_bytes=self._read_bytes,
            blocks=count,
            spans=len(self._spans),
        )

    def _advance(
        self, index: int, span: int, before: Sequence[Task], solved: Sequence[Task], old: Sequence[Task]
    ) -> Task:
        """Hidden states of a span from the block before (or the tokens) to this one."""
        places = [*self._sources.get(None, ()), *self._sources[index]]
        if index:
            places += self._sources[index - 1]
        own: dict[str, Any] = {
            "config": dict(self._checkpoint.config or {}),
            "blocks": self._blocks.count,
            "path": self._blocks.path,
            "source": pieces_to_json([_whole(item_at(tensor, at)) for tensor, at in places]),
            "weights": [item.name for item in self._items.get(index, ())],
            "before": [task.digest for task in before],
            "solved": pieces_to_json([_whole(item) for item in self._items.get(index - 1, ())]),
            "solved_by": {
                item.name: self._solvers[item.name].digest for item in self._items.get(index - 1, ())
            },
            "used_up": [task.digest for task in old],
            "both_bytes": self._memory[index].observing + (self._memory[index - 1].passing if index else 0),
        }
        if not index:
            own["quota"] = self._quota
            own["samples"] = [places_of(chunk) for chunk in self._spans[span]]
        renewed = {item.name for item in self._items.get(index - 1, ())}
        self._read_bytes += sum(at.info.size_bytes for name, at in places if name not in renewed)
        needs = dict.fromkeys(task.id for task in (*before, *solved))
        return self._add("advance", f"advance[{index}.{span}]", tuple(needs), own, block=index, span=span)

    def _solve(self, index: int, group: int, items: Sequence[Item], observed: Sequence[Task]) -> None:
        """Some matrices of a block, once all spans have passed."""
        own = {
            "items": pieces_to_json([_whole(item) for item in items]),
            "observed": [task.digest for task in observed],
        }
        needs = tuple(task.id for task in observed)
        task = self._add("solve", f"solve[{index}.{group}]", needs, own, block=index, group=group)
        self._solvers |= {item.name: task for item in items}
        self._read_bytes += sum(item.size_bytes for item in items)

    def _add(
        self, kind: str, label: str, needs: tuple[str, ...], own: Mapping[str, Any], **facts: int
    ) -> Task:
        name_of_work = digest(kind, work=self._work, name=self._name, **facts)
        task = Task(
            id=f"{self._name}/{label}",
            model=self._name,
            kind=kind,
            digest=name_of_work,
            needs=needs,
            payload={
                **self._place,
                "name": self._name,
                "artifact": self._artifact,
                "digest": name_of_work,
                "memory_bytes": self._memory_bytes,
                **facts,
                **own,
            },
            memory_bytes=self._memory_bytes,
        )
        self._tasks.append(task)
        return task

    def _check_memory(self, index: int) -> int:
        """What the tasks of a block need at least, however few the sequences are."""
        found = block_memory(self._sources[index], self._items.get(index, ()))
        self._memory.append(found)
        if found.observing > self._memory_bytes:
            raise ModelError(
                f"{self._checkpoint.uri}: block {index} ({self._blocks.path}{index}) needs {found.observing} bytes of "
                f"memory, weights and statistics of its inputs, more than the {self._memory_bytes} of "
                "resources.memory_per_task; raise it, or take a method that needs no data"
            )
        if found.solving > self._memory_bytes:
            raise ModelError(
                f"{self._checkpoint.uri}: {found.largest} needs {found.solving} bytes of memory to be solved, with the "
                f"products of its inputs, more than the {self._memory_bytes} of resources.memory_per_task; raise it, "
                "or take a method that needs no data"
            )
        return max(found.observing, found.solving)


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Matrices in runs of about SOLVE_BYTES, in the order of the source."""
    run: list[Item] = []
    for item in items:
        if run and sum(one.size_bytes for one in run) + item.size_bytes > SOLVE_BYTES:
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _whole(item: Item) -> Piece:
    return Piece(item=item, first_row=0, rows=item.geometry.rows, in_tail=())
