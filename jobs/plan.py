"""What has to be done to a model, as tasks: which, in which order, and under which digests. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetpress.storage.checkpoint import Checkpoint
from fleetpress.storage.sources import SourceFile

from .checkpoint.choice import check_plain, choose
from .checkpoint.layout import plan_shards
from .checkpoint.memory import task_memory
from .checkpoint.tasks import checkpoint_tasks
from .digests import contents, digest
from .fleet import Data, Model, Shard, absolute
from .spec_checks import needs_gradients
from .tasks import GPU, Task

GROUP_BYTES = 32 << 20  # weights that one quantize task works on
CHUNK_BYTES = 64 << 20  # data that one collect task reads
_GPU_KINDS = ("train", "collect", "finetune")  # steps that compute gradients


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The tasks of one model; `digest` names its artifact, `needs_gradients` says that statistics are collected."""

    model: Model
    digest: str
    tasks: tuple[Task, ...]


def artifact_digest(model: Model, *, seed: int, workers: int, gpus: float = 0.0) -> str:
    """Names the model's artifact: everything that can change its bytes, known from listings alone."""
    final = "assemble" if model.source.kind == "checkpoint" else "publish"
    return digest(
        final,
        **_identity(model),
        data=_data_identity(model.data),
        seed=seed,
        workers=_trainers(model, workers),
        **(_device(gpus) if _has_gradients(model) else {}),
    )


def plan_program(
    model: Model,
    *,
    output: str,
    run: str,
    seed: int,
    workers: int,
    memory_bytes: int,
    gradients: bool,
    inputs: bool = False,
    observed: bool = False,
    gpus: float = 0.0,
) -> ModelPlan:
    """Tasks of a program or module: export?, train?, collect*, observe*, prune?, finetune?, calibrate*, quantize*,
    publish.

    `gradients` says that the pruning method reads gradient statistics. They come from training when it has
    targets, from `collect` tasks otherwise. `inputs` says that the quantization method reads calibration statistics,
    `observed` that the pruning method does.
    """
    recipe = model.recipe.canonical()
    builder = _Builder(
        model=model, recipe=recipe, output=output, run=run, seed=seed, memory_bytes=memory_bytes, gpus=gpus
    )
    if model.source.kind == "module":
        shown = (model.data.train or model.data.eval)[:1] if model.data and not model.inputs else ()
        builder.add(
            "export",
            factory=model.factory,
            code=model.factory_digest,
            inputs=model.inputs,
            example=_contents(shown),
        )
    if "train" in recipe:
        builder.add("train", workers=workers, options=recipe["train"], **builder.training)
    if gradients and ("collect" in recipe or "train" not in recipe or builder.unlabelled):
        builder.add_chunks("collect", recipe.get("collect", {"batch_size": 64}))
    shards = len(model.data.train) if model.data else 1
    if observed:
        builder.add_chunks("observe", recipe["calibrate"], shards=shards)
    if "prune" in recipe:
        builder.add("prune", options=recipe["prune"], seed=seed)
    if "finetune" in recipe:
        builder.add("finetune", workers=workers, options=recipe["finetune"], **builder.training)
    if inputs:
        builder.add_chunks("calibrate", recipe["calibrate"], shards=shards)
    if "quantize" in recipe:
        builder.add_groups(recipe["quantize"])
    final = artifact_digest(model, seed=seed, workers=workers, gpus=gpus)
    return ModelPlan(model=model, digest=final, tasks=builder.finish("publish", final))


def plan_checkpoint(
    model: Model, checkpoint: Checkpoint, *, output: str, run: str, seed: int, memory_bytes: int
) -> ModelPlan:
    """Tasks of a checkpoint: open?, convert*, finish*, assemble. The headers tell every byte that will be written.

    Raises TargetError, and ModelError for what is quantized already or a task too large for `memory_bytes`.
    """
    check_plain(checkpoint)
    final = artifact_digest(model, seed=seed, workers=1)
    builder = _Builder(
        model=model,
        recipe=model.recipe.canonical(),
        output=output,
        run=run,
        seed=seed,
        memory_bytes=memory_bytes,
    )
    choice = choose(checkpoint, builder.shared["recipe"])
    place = {"output": output, "root": absolute(checkpoint.root), "uri": model.source.uri}
    tasks, records = checkpoint_tasks(
        plan_shards(choice.items),
        name=model.name,
        artifact=final,
        place=place,
        memory_bytes=memory_bytes,
    )
    builder.tasks = tasks
    builder.last = tuple(task.id for task in tasks if task.digest in records)
    return ModelPlan(
        model=model, digest=final, tasks=builder.finish("assemble", final, shard_records=records)
    )


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


def _identity(model: Model) -> dict[str, Any]:
    return {
        "source": contents(model.source.files, named=model.source.kind == "checkpoint"),
        "recipe": model.recipe.canonical(),
        "factory": model.factory,
        "code": model.factory_digest,
        "inputs": model.inputs,
    }


def _data_identity(data: Data | None) -> dict[str, Any] | None:
    if data is None:
        return None
    return {
        "train": _contents(data.train),
        "eval": _contents(data.eval),
        "loss": data.loss,
        "metric": data.metric,
    }


def _device(gpus: float) -> dict[str, str]:
    """What a GPU adds to a digest: it rounds otherwise than a processor. How much of it a task gets changes nothing."""
    return {"device": GPU} if gpus else {}


def _has_gradients(model: Model) -> bool:
    """Whether a step of the recipe computes gradients, which a GPU may do."""
    recipe = model.recipe
    collects = recipe.prune is not None and needs_gradients(recipe.prune)
    return collects or recipe.train is not None or recipe.finetune is not None


def _trainers(model: Model, workers: int) -> int:
    """Data-parallel workers may change the last digits of trained weights, so they are part of a training digest."""
    trains = model.recipe.train is not None or model.recipe.finetune is not None
    return workers if trains else 1


class _Builder:
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
        self._gpus = gpus
        self.tasks: list[Task] = []
        self.last: tuple[str, ...] = ()
        self.stages: dict[str, Any] = {}  # digests of the records that later tasks read, by kind
        self._before: Any = contents(model.source.files, named=model.source.kind == "checkpoint")
        self._memory_bytes = memory_bytes
        data = model.data
        self.unlabelled = data is None or data.loss in (None, "distillation")
        self.training = {"trained_on": _contents(data.train), "loss": data.loss, "seed": seed} if data else {}
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
                "inputs": model.inputs,
            },
            "data": {
                "train": [_shard(shard) for shard in data.train],
                "eval": [_shard(shard) for shard in data.eval],
                "loss": data.loss,
                "metric": data.metric,
            }
            if data
            else None,
        }

    def new(self, kind: str, label: str, *, workers: int = 1, **facts: Any) -> str:
        """Append a task that needs `last`; `facts` are both its own payload and, with what comes before, its digest."""
        gpus = self._gpus if kind in _GPU_KINDS else 0.0
        facts = {**facts, **_device(gpus)}
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

    def add(self, kind: str, **facts: Any) -> None:
        """Append one task and make it what the next one builds on."""
        self.last = (self.new(kind, kind, **facts),)
        self.stages[kind] = self.tasks[-1].digest
        self._before = self.tasks[-1].digest

    def add_chunks(self, kind: str, options: dict[str, Any], **facts: Any) -> None:
        """Statistics in chunks of the data that do not depend on the number of workers."""
        data = self.model.data
        assert data is not None, "checked by the spec: statistics need data"
        sizes = {str(index): shard.file.bytes for index, shard in enumerate(data.train)}
        chunks = [[data.train[int(index)] for index in run] for run in shard_names(sizes, CHUNK_BYTES)]
        self._fan_out(
            kind,
            [
                {
                    **facts,
                    "options": options,
                    "collected_on": _contents(chunk),
                    "first_shard": data.train.index(chunk[0]),
                    "loss": data.loss,
                    "seed": self.shared["seed"],
                }
                for chunk in chunks
            ],
            [{"files": [_shard(shard) for shard in chunk]} for chunk in chunks],
        )

    def add_groups(self, options: dict[str, Any]) -> None:
        """Layers in groups of equal bytes; small models are one group."""
        total = sum(file.bytes for file in self.model.source.files)
        count = max(1, -(-total // GROUP_BYTES))
        self._fan_out(
            "quantize", [{"options": options, "index": i, "count": count} for i in range(count)], [{}] * count
        )

    def _fan_out(self, kind: str, facts: list[dict[str, Any]], places: list[dict[str, Any]]) -> None:
        ids, digests = [], []
        for index, (own, place) in enumerate(zip(facts, places, strict=True)):
            label = kind if len(facts) == 1 else f"{kind}[{index}]"
            ids.append(self.new(kind, label, **own))
            if place:
                task = self.tasks[-1]
                self.tasks[-1] = _with_payload(task, place)
            digests.append(self.tasks[-1].digest)
        self.last = tuple(ids)
        self.stages[kind] = digests
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
            return task_memory((), self._memory_bytes)
        return self._memory_bytes


def _with_payload(task: Task, extra: dict[str, Any]) -> Task:
    return Task(**{**vars(task), "payload": {**task.payload, **extra}})


def _plain(file: SourceFile) -> dict[str, Any]:
    return {"path": file.path, "etag": file.etag, "bytes": file.bytes}


def _shard(shard: Shard) -> dict[str, Any]:
    return {"root": shard.root, **_plain(shard.file)}


def _contents(shards: Sequence[Shard]) -> list[list[Any]]:
    return contents(shard.file for shard in shards)
