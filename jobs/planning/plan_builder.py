"""The chain of tasks of one model as it grows, with the digests that follow from what came before. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fleetpress.storage.sources import SourceFile

from ..checkpoint.memory import task_memory
from ..digests import contents, digest
from ..tasks import GPU, Task
from .fleet import (
    Fold,
    Model,
    Shard,
    absolute,
)

GROUP_BYTES = 32 << 20  # weights that one quantize task works on
CHUNK_BYTES = 64 << 20  # data that one collect task reads
_GPU_KINDS = ("train", "collect", "finetune", "observe", "trial")  # steps that compute gradients


def shard_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensor names in runs of at most `limit` bytes, in the given order; a larger tensor is a run of its own."""
    runs: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if runs[-1] and filled + size > limit:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += size
    return runs


def device_facts(gpus: float) -> dict[str, str]:
    """What a GPU adds to a digest: it rounds otherwise than a processor. How much of it a task gets changes nothing."""
    return {"device": GPU} if gpus else {}


class PlanBuilder:
    """Grows the chain of tasks of one model; `last` are the ids that the next task needs."""

    def __init__(
        self,
        *,
        model: Model,
        recipe: dict[str, Any],
        output: str,
        run: str,
        seed: int,
        memory_bytes: int,
        gpus: float = 0.0,
    ) -> None:
        self.model = model
        self.gpus = gpus
        self.tasks: list[Task] = []
        self.last: tuple[str, ...] = ()
        self.stages: dict[str, Any] = {}  # digests of the records that later tasks read, by kind
        self._before: Any = contents(model.source.files, named=model.source.kind == "checkpoint")
        self.memory_bytes = memory_bytes
        self.round: dict[str, int] = {}  # which of several rounds the tasks are of
        self.data = data = model.data
        self.train_shards = len(data.train) if data else 1
        self.unlabelled = data is None or data.loss in (None, "distillation")
        self.training = (
            {"trained_on": shard_contents(data.train), "loss": data.loss, "seed": seed} if data else {}
        )
        self.shared: dict[str, Any] = {
            "output": output,
            "run": run,
            "seed": seed,
            "recipe": recipe,
            "model": {
                "name": model.name,
                "kind": model.source.kind,
                "uri": model.source.uri,
                "root": absolute(model.source.root),
                "files": [_plain(file) for file in model.source.files],
                "factory": model.factory,
                "factory_digest": model.factory_digest,
                "inputs": model.inputs,
            },
            "data": {
                "train": [shard_facts(shard) for shard in data.train],
                "eval": [shard_facts(shard) for shard in data.eval],
                "loss": data.loss,
                "metric": data.metric,
            }
            if data
            else None,
        }

    def keep_to(self, fold: Fold | None) -> None:
        """What is added from here on sees no other samples of the train data."""
        if fold is None or self.data is None:
            return
        train = tuple(
            replace(shard, fold=fold.in_shard(number)) for number, shard in enumerate(self.data.train)
        )
        self.data = replace(self.data, train=train)
        self.training |= {"trained_on": shard_contents(train)}
        self.shared["data"] = {**self.shared["data"], "train": [shard_facts(shard) for shard in train]}

    def new(self, kind: str, label: str, *, workers: int = 1, **facts: Any) -> str:
        """Append a task that needs `last`; `facts` are both its own payload and, with what comes before, its digest."""
        gpus = self.gpus if kind in _GPU_KINDS else 0.0
        facts = {**facts, **device_facts(gpus)}
        identity = {**facts, "before": self._before}
        if kind in ("train", "finetune"):
            identity["workers"] = workers
        own = digest(kind, **identity)
        task = Task(
            id=f"{self.model.name}/{label}",
            model=self.model.name,
            kind=kind,
            digest=own,
            needs=self.last,
            payload={**self.shared, **facts, "digest": own, "stages": dict(self.stages)},
            memory_bytes=self._memory(),
            gpus=gpus,
            workers=workers,
        )
        self.tasks.append(task)
        return task.id

    def begin_round(self, index: int) -> None:
        """What was pruned and tuned so far is what the next round starts from."""
        if index:
            done = [self.stages.pop("prune"), self.stages.pop("finetune")]
            self.stages["rounds"] = [*self.stages.get("rounds", []), done]
            for stage in ("collect", "observe"):
                self.stages.pop(stage, None)
        self.round = {"round": index}

    def _label(self, name: str, chunk: int | None = None) -> str:
        """A task's name among those of the model: of which round and chunk it is, where there are several."""
        places = [*self.round.values(), *([] if chunk is None else [chunk])]
        return f"{name}[{'.'.join(map(str, places))}]" if places else name

    def add(self, kind: str, **facts: Any) -> None:
        """Append one task and make it what the next one builds on."""
        self.last = (self.new(kind, self._label(kind), **facts),)
        self.stages[kind] = self.tasks[-1].digest
        self._before = self.tasks[-1].digest

    def add_together(self, *stages: Callable[[], None]) -> None:
        """Stages that need what came before and not one another; what comes next needs all of them."""
        begin, known, ends = (self.last, self._before), self.stages, []
        merged = dict(known)
        for add in stages:
            (self.last, self._before), self.stages = begin, dict(known)
            add()
            merged |= self.stages
            ends.append((self.last, self._before))
        self.stages = merged
        if len(ends) > 1:
            self.last = tuple(task for ids, _ in ends for task in ids)
            self._before = [digests for _, digests in ends]

    def add_chunks(self, kind: str, options: dict[str, Any], stage: str = "", **facts: Any) -> None:
        """Statistics in chunks of the data that do not depend on the number of workers, of a stage of that name."""
        data = self.data
        assert data is not None, "checked by the spec: statistics need data"
        sizes = {str(index): shard.file.bytes for index, shard in enumerate(data.train)}
        chunks = [[data.train[int(index)] for index in run] for run in shard_names(sizes, CHUNK_BYTES)]
        self.fan_out(
            kind,
            [
                {
                    **facts,
                    "options": options,
                    "collected_on": shard_contents(chunk),
                    "first_shard": data.train.index(chunk[0]),
                    "loss": data.loss,
                    "seed": self.shared["seed"],
                }
                for chunk in chunks
            ],
            [{"files": [shard_facts(shard) for shard in chunk]} for chunk in chunks],
            stage or kind,
        )

    def add_groups(self, kind: str, options: dict[str, Any]) -> None:
        """Layers in groups of equal bytes; small models are one group."""
        total = sum(file.bytes for file in self.model.source.files)
        count = max(1, -(-total // GROUP_BYTES))
        self.fan_out(
            kind, [{"options": options, "index": i, "count": count} for i in range(count)], [{}] * count, kind
        )

    def fan_out(
        self, kind: str, facts: list[dict[str, Any]], places: list[dict[str, Any]], stage: str
    ) -> None:
        """Append tasks that need what came before and not one another; `places` are no part of their digests."""
        ids, digests = [], []
        for index, (own, place) in enumerate(zip(facts, places, strict=True)):
            chunk = None if len(facts) == 1 else index
            ids.append(self.new(kind, self._label(stage, chunk), **own))
            if place:
                task = self.tasks[-1]
                self.tasks[-1] = _with_payload(task, place)
            digests.append(self.tasks[-1].digest)
        self.last = tuple(ids)
        self.stages[stage] = digests
        self._before = digests

    def finish(self, kind: str, final: str, **own: Any) -> tuple[Task, ...]:
        """Append the task that validates and publishes under the artifact's own digest."""
        plan_digest = digest(kind, tasks=[task.digest for task in self.tasks], artifact=final)
        self.tasks.append(
            Task(
                id=f"{self.model.name}/{kind}",
                model=self.model.name,
                kind=kind,
                digest=final,
                needs=self.last,
                payload={
                    **self.shared,
                    "digest": final,
                    "stages": dict(self.stages),
                    "plan_digest": plan_digest,
                    **own,
                },
                memory_bytes=self._memory(),
            )
        )
        return tuple(self.tasks)

    def _memory(self) -> int:
        """Of a program, all that the spec allows: how far its data unpacks is known only when it is read."""
        if self.model.source.kind == "checkpoint":
            return task_memory((), self.memory_bytes)
        return self.memory_bytes


def _with_payload(task: Task, extra: dict[str, Any]) -> Task:
    return Task(**{**vars(task), "payload": {**task.payload, **extra}})


def _plain(file: SourceFile) -> dict[str, Any]:
    return {"path": file.path, "etag": file.etag, "bytes": file.bytes}


def shard_facts(shard: Shard) -> dict[str, Any]:
    """A shard as payloads hold it."""
    part = {} if shard.fold is None else {"fold": dict(vars(shard.fold))}
    return {"root": shard.root, **_plain(shard.file), **part}


def shard_contents(shards: Sequence[Shard]) -> list[list[Any]]:
    whole = contents(shard.file for shard in shards)
    return [
        item if shard.fold is None else [*item, dict(vars(shard.fold))]
        for item, shard in zip(whole, shards, strict=True)
    ]
