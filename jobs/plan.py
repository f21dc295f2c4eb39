"""What has to be done to a model, as tasks: which, in which order, and under which digests. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fleetpress.storage.checkpoint import Checkpoint
from fleetpress.storage.sources import SourceFile

from .checkpoint.choice import check_plain, choose
from .checkpoint.layout import plan_shards
from .checkpoint.memory import task_memory
from .checkpoint.tasks import checkpoint_tasks
from .digests import contents, digest
from .fleet import Data, Fold, Model, Shard, absolute
from .recipe import is_gradual, later_steps
from .spec_checks import needs_gradients
from .tasks import GPU, Task

GROUP_BYTES = 32 << 20  # weights that one quantize task works on
CHUNK_BYTES = 64 << 20  # data that one collect task reads
_GPU_KINDS = ("train", "collect", "finetune", "observe", "trial")  # steps that compute gradients
TRIALS_AT_ONCE = (
    4  # of a search: as many candidates are measured side by side before anything is learnt from them
)
SENSED_SAMPLES = 512


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The tasks of one model; `digest` names its artifact, `needs_gradients` says that statistics are collected."""

    model: Model
    digest: str
    tasks: tuple[Task, ...]


def artifact_digest(
    model: Model, *, seed: int, workers: int, gpus: float = 0.0, fleet: str | None = None
) -> str:
    """Names the model's artifact: everything that can change its bytes, known from listings alone.

    `fleet` names the models that share a budget with it, and the budget.
    """
    final = "assemble" if model.source.kind == "checkpoint" else "publish"
    return digest(
        final,
        **_identity(model),
        data=_data_identity(model.data),
        seed=seed,
        workers=_trainers(model, workers),
        **(_device(gpus) if _has_gradients(model) else {}),
        **({"fleet": fleet} if fleet is not None and model.recipe.auto is not None else {}),
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
    gpus: float = 0.0,
    fold: Fold | None = None,
    fleet: str | None = None,
) -> ModelPlan:
    """Tasks of a program or module: export?, train?, collect*, prune?, finetune?, calibrate*, quantize*, publish.

    `gradients` says that the pruning method reads gradient statistics. They come from training when it has
    targets, from `collect` tasks otherwise. `inputs` says that the quantization method reads calibration statistics.
    What comes after `train` sees no sample outside the `fold`, if there is one.
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
    final = artifact_digest(model, seed=seed, workers=workers, gpus=gpus, fleet=fleet)
    if "auto" in recipe:
        tasks = _search(builder, recipe["auto"], final, workers=workers)
        return ModelPlan(model=model, digest=final, tasks=tasks)
    builder.keep_to(fold)
    if gradients and ("collect" in recipe or "train" not in recipe or builder.unlabelled):
        builder.add_chunks("collect", recipe.get("collect", {"batch_size": 64}))
    if "prune" in recipe and not is_gradual(recipe):
        builder.add("prune", options=recipe["prune"], seed=seed)
    if "finetune" in recipe:
        later = later_steps(recipe)
        builder.add("finetune", workers=workers, options=recipe["finetune"], **later, **builder.training)
    if inputs:
        shards = len(model.data.train) if model.data else 1
        builder.add_chunks("calibrate", recipe["calibrate"], shards=shards)
    if "quantize" in recipe:
        builder.add_groups("quantize", recipe["quantize"])
    return ModelPlan(model=model, digest=final, tasks=builder.finish("publish", final))


def _search(builder: "_Builder", options: dict[str, Any], final: str, *, workers: int) -> tuple[Task, ...]:
    """Tasks of `auto`: observe*, sense*, rounds of trials that see what those before them measured, publish.

    How many there are does not depend on what they find, so the search is resumed like any other work.
    """
    data = builder.data
    assert data is not None, "checked by the spec: auto needs data"
    builder.add_chunks("observe", {"samples": SENSED_SAMPLES, "batch_size": 32}, shards=len(data.train))
    builder.add_groups("sense", options)
    search = {"options": options, "loss": data.loss, "metric": data.metric, "trainers": workers}
    place = {"memory_bytes": builder.memory_bytes, "gpus": builder.gpus}
    rounds = -(-options["trials"] // TRIALS_AT_ONCE)
    builder.stages["trial"] = []
    for number in range(rounds):
        count = min(TRIALS_AT_ONCE, options["trials"] - number * TRIALS_AT_ONCE)
        facts = [
            {**search, "round": number, "index": index, "searched_on": _contents(data.train)}
            for index in range(count)
        ]
        before = list(builder.stages["trial"])
        builder.fan_out(
            "trial", facts, [place] * count, labels=[f"trial[{number}.{index}]" for index in range(count)]
        )
        builder.stages["trial"] = before + builder.stages["trial"]
    return builder.finish("publish", final, is_search=True, **search, **place)


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
    return collects or recipe.auto is not None or recipe.train is not None or recipe.finetune is not None


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
        self.gpus = gpus
        self.tasks: list[Task] = []
        self.last: tuple[str, ...] = ()
        self.stages: dict[str, Any] = {}  # digests of the records that later tasks read, by kind
        self._before: Any = contents(model.source.files, named=model.source.kind == "checkpoint")
        self.memory_bytes = memory_bytes
        self.data = data = model.data
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
        train = tuple(replace(shard, fold=fold) for shard in self.data.train)
        self.data = replace(self.data, train=train)
        self.training |= {"trained_on": _contents(train)}
        self.shared["data"] = {**self.shared["data"], "train": [shard_facts(shard) for shard in train]}

    def new(self, kind: str, label: str, *, workers: int = 1, **facts: Any) -> str:
        """Append a task that needs `last`; `facts` are both its own payload and, with what comes before, its digest."""
        gpus = self.gpus if kind in _GPU_KINDS else 0.0
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
                    "collected_on": _contents(chunk),
                    "first_shard": data.train.index(chunk[0]),
                    "loss": data.loss,
                    "seed": self.shared["seed"],
                }
                for chunk in chunks
            ],
            [{"files": [shard_facts(shard) for shard in chunk]} for chunk in chunks],
        )

    def add_groups(self, kind: str, options: dict[str, Any]) -> None:
        """Layers in groups of equal bytes; small models are one group."""
        total = sum(file.bytes for file in self.model.source.files)
        count = max(1, -(-total // GROUP_BYTES))
        self.fan_out(
            kind, [{"options": options, "index": i, "count": count} for i in range(count)], [{}] * count
        )

    def fan_out(
        self,
        kind: str,
        facts: list[dict[str, Any]],
        places: list[dict[str, Any]],
        labels: Sequence[str] = (),
    ) -> None:
        """Append tasks that need what came before and not one another; `places` are no part of their digests."""
        ids, digests = [], []
        for index, (own, place) in enumerate(zip(facts, places, strict=True)):
            label = labels[index] if labels else kind if len(facts) == 1 else f"{kind}[{index}]"
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


def _contents(shards: Sequence[Shard]) -> list[list[Any]]:
    whole = contents(shard.file for shard in shards)
    return [
        item if shard.fold is None else [*item, dict(vars(shard.fold))]
        for item, shard in zip(whole, shards, strict=True)
    ]
