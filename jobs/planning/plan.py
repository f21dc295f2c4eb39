"""What has to be done to a model, as tasks: which, in which order, and under which digests. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fleetpress.compression.rounds import epochs_of
from fleetpress.storage.checkpoint import Checkpoint

from ..checkpoint.choice import Choice, check_plain, choose
from ..checkpoint.layout import plan_shards
from ..checkpoint.tasks import checkpoint_tasks
from ..digests import VERSIONS, contents, digest
from ..spec.checks import (
    needs_gradients,
    needs_products,
    observes,
)
from ..spec.recipe import (
    DEFAULT_FORMAT,
    CalibrateStep,
    PruneStep,
    is_gradual,
    later_steps,
)
from ..tasks import Task
from .fleet import (
    Data,
    Fold,
    Model,
    absolute,
)
from .plan_builder import (
    PlanBuilder,
    device_facts,
    shard_contents,
)

TRIALS_AT_ONCE = (
    4  # candidates of a search that are measured side by side before anything is learnt from them
)
SENSED_SAMPLES = 512
_OPERATIONS_VERSION = 1  # of searches for few operations or little time


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
        **(device_facts(gpus) if _has_gradients(model) else {}),
        **({"fleet": fleet} if fleet is not None and model.recipe.auto is not None else {}),
        **({"search": _search_versions(model)} if model.recipe.auto is not None else {}),
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
    """Tasks of a program or module, in this order: export?, train?, collect*, prune?, finetune?, calibrate*, equalize?,
    quantize*, publish.

    `gradients` says that the pruning method reads gradient statistics. They come from training when it has
    targets, from `collect` tasks otherwise. What a pruning step knows of the layers' inputs comes from `calibrate`
    tasks before it, labelled observe. An iterative schedule repeats the steps from collect to finetune. `inputs` says
    that the quantization method reads calibration statistics. What comes after `train` sees no sample outside the
    `fold`, if there is one.
    """
    recipe = model.recipe.canonical()
    builder = PlanBuilder(
        model=model, recipe=recipe, output=output, run=run, seed=seed, memory_bytes=memory_bytes, gpus=gpus
    )
    if model.source.kind == "module":
        shown = (model.data.train or model.data.eval)[:1] if model.data and not model.inputs else ()
        builder.add(
            "export",
            factory=model.factory,
            code=model.factory_digest,
            inputs=model.inputs,
            example=shard_contents(shown),
        )
    more = _more_statistics(model.recipe.prune) if gradients else {}
    if "train" in recipe:
        kept = {} if "collect" in recipe else more  # of statistics that the training keeps
        builder.add("train", workers=workers, options=recipe["train"], **builder.training, **kept)
    final = artifact_digest(model, seed=seed, workers=workers, gpus=gpus, fleet=fleet)
    if "auto" in recipe:
        tasks = _search(builder, recipe["auto"], final, workers=workers)
        return ModelPlan(model=model, digest=final, tasks=tasks)
    builder.keep_to(fold)
    _add_rounds(builder, gradients=gradients, workers=workers, more=more)
    if inputs:
        builder.add_chunks("calibrate", recipe["calibrate"], shards=builder.train_shards)
    if recipe.get("quantize", {}).get("equalize"):
        builder.add("equalize", options=recipe["quantize"])
    if "quantize" in recipe:
        builder.add_groups("quantize", recipe["quantize"])
    return ModelPlan(model=model, digest=final, tasks=builder.finish("publish", final))


def _add_rounds(builder: PlanBuilder, *, gradients: bool, workers: int, more: dict[str, Any]) -> None:
    """Tasks from collect to finetune, once or round by round; `more` is what is collected beside gradients."""
    recipe, prune, seed = builder.shared["recipe"], builder.model.recipe.prune, builder.shared["seed"]
    rounds = recipe.get("prune", {}).get("rounds", 1)
    for index in range(rounds):
        if rounds > 1:
            builder.begin_round(index)
        if gradients and (index or "collect" in recipe or "train" not in recipe or builder.unlabelled):
            builder.add_chunks("collect", recipe.get("collect", {"batch_size": 64}), **more)
        if prune is not None and observes(prune):
            builder.add_chunks("calibrate", recipe["calibrate"], "observe", shards=builder.train_shards)
        if "prune" in recipe and not is_gradual(recipe):
            builder.add("prune", options=recipe["prune"], seed=seed, **builder.round)
        if "finetune" in recipe:
            is_last = index == rounds - 1
            tuning: dict[str, Any] = {**builder.training, **(later_steps(recipe) if is_last else {})}
            epochs = recipe["finetune"]["epochs"]
            if rounds > 1:
                tuning["seed"] += index  # so that no round sees the samples in the order of another
            options = {**recipe["finetune"], "epochs": epochs_of(epochs, index, rounds)}
            builder.add("finetune", workers=workers, options=options, **tuning)
    builder.round = {}


def _search(builder: PlanBuilder, options: dict[str, Any], final: str, *, workers: int) -> tuple[Task, ...]:
    """Tasks of `auto`: observe*, sense*, rounds of trials that see what those before them measured, publish.

    How many there are does not depend on what they find, so the search is resumed like any other work.
    """
    data = builder.data
    assert data is not None, "checked by the spec: auto needs data"
    builder.add_chunks("observe", {"samples": SENSED_SAMPLES, "batch_size": 32}, shards=len(data.train))
    builder.add_groups("sense", {"operations": True} if counts_operations(options) else {})
    recipe = builder.model.recipe
    search = {
        "options": options,
        "loss": data.loss,
        "metric": data.metric,
        "trainers": workers,
        "limit": recipe.validation.max_drop,
        "form": recipe.format or DEFAULT_FORMAT,
        "measured_on": shard_contents(data.eval),
    }
    place = {"memory_bytes": builder.memory_bytes, "gpus": builder.gpus}
    rounds = -(-options["trials"] // TRIALS_AT_ONCE)
    builder.stages["trial"] = []
    for number in range(rounds):
        count = min(TRIALS_AT_ONCE, options["trials"] - number * TRIALS_AT_ONCE)
        facts = [
            {**search, "round": number, "index": index, "searched_on": shard_contents(data.train)}
            for index in range(count)
        ]
        before = list(builder.stages["trial"])
        builder.round = {"round": number}
        builder.fan_out("trial", facts, [place] * count, "trial")
        builder.stages["trial"] = before + builder.stages["trial"]
    builder.round = {}
    return builder.finish("publish", final, is_search=True, **search, **place)


def _search_versions(model: Model) -> list[int]:
    """Versions of what a search does; counting operations has one of its own, so that other searches keep theirs."""
    auto = model.recipe.auto
    counts = auto is not None and counts_operations(auto.model_dump(exclude_none=True))
    return [VERSIONS["sense"], VERSIONS["trial"], *([_OPERATIONS_VERSION] if counts else [])]


def _more_statistics(step: PruneStep | None) -> dict[str, Any]:
    """What is collected beside gradients: facts of their own, so that digests of all else stay as they were."""
    if step is None:
        return {}
    wanted = {"products": needs_products(step), "recurrent": "recurrent" in step.structure}
    return {name: True for name, needed in wanted.items() if needed}


def counts_operations(auto: Mapping[str, Any]) -> bool:
    """Whether a search with these options is for few operations or little time, and not for few bytes."""
    return auto["goal"] == "fastest" or "macs" in auto or "latency_ms" in auto


def without_end(plan: ModelPlan) -> ModelPlan:
    """The plan up to its last task, which cannot be planned before the others are done."""
    return replace(plan, tasks=plan.tasks[:-1])


def plan_checkpoint(
    model: Model, checkpoint: Checkpoint, *, output: str, run: str, seed: int, memory_bytes: int
) -> ModelPlan:
    """Tasks of a checkpoint: advance* and solve* by turns if it is calibrated, open?, convert*, finish*, assemble.

    The headers tell every byte that will be written. Raises TargetError, and ModelError for what is quantized already
    or a task too large for `memory_bytes`.
    """
    check_plain(checkpoint)
    final = artifact_digest(model, seed=seed, workers=1)
    builder = PlanBuilder(
        model=model,
        recipe=model.recipe.canonical(),
        output=output,
        run=run,
        seed=seed,
        memory_bytes=memory_bytes,
    )
    choice = choose(checkpoint, builder.shared["recipe"])
    place = {"output": output, "root": absolute(checkpoint.root), "uri": model.source.uri}
    shared: dict[str, Any] = {"name": model.name, "memory_bytes": memory_bytes}
    added = _run_tasks(model, checkpoint, choice, builder, {**place, "artifact": final}, **shared)
    builder.tasks = list(added.tasks)
    tasks, records = checkpoint_tasks(
        plan_shards(choice.items), artifact=final, place=place, solvers=added.solvers, **shared
    )
    builder.tasks += tasks
    builder.last = tuple(task.id for task in tasks if task.digest in records) + added.last
    return ModelPlan(
        model=model,
        digest=final,
        tasks=builder.finish("assemble", final, shard_records=records, **added.facts),
    )


@dataclass(frozen=True, kw_only=True)
class _RunTasks:
    """Tasks that run a checkpoint: those that solve a matrix by its name, those that the last task waits for.

    `facts` are what that one knows of them.
    """

    tasks: tuple[Task, ...] = ()
    solvers: Mapping[str, Task] = field(default_factory=dict)
    last: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def _run_tasks(
    model: Model,
    checkpoint: Checkpoint,
    choice: Choice,
    builder: PlanBuilder,
    place: Mapping[str, Any],
    *,
    name: str,
    memory_bytes: int,
) -> _RunTasks:
    """Calibration, if a method needs it, and scores on held-out data, if there are any."""
    data, recipe = model.data, builder.shared["recipe"]
    scores = data is not None and bool(data.eval)
    if choice.blocks is None and not scores:
        return _RunTasks()
    # Behind torch: the plan of what is only converted does without.
    from ..checkpoint.calibrating import CalibrationPlanner, require_transformers
    from ..checkpoint.quality import score_tasks

    require_transformers(model.source.uri)
    assert data is not None, "checked by the spec: statistics need data"
    options = recipe.get("calibrate") or CalibrateStep().model_dump()
    # What is measured in the end, and how much of it may be lost, changes nothing of what is done before.
    done = {step: chosen for step, chosen in recipe.items() if step != "validate"}
    work = digest(
        "run", source=_identity(model)["source"], recipe=done, trained_on=shard_contents(data.train)
    )
    shared: dict[str, Any] = {"name": name, "work": work, "options": options, "memory_bytes": memory_bytes}
    tasks: list[Task] = []
    solvers: Mapping[str, Task] = {}
    facts: dict[str, Any] = {}
    if choice.blocks is not None:
        found = CalibrationPlanner(
            choice,
            checkpoint,
            builder.shared["data"]["train"],
            artifact=place["artifact"],
            place={key: value for key, value in place.items() if key != "artifact"},
            **shared,
        ).run()
        tasks, solvers = list(found.tasks), found.solvers
        facts = {"spilled": [task.digest for task in tasks]}
    solving = list({task.digest: task for task in solvers.values()}.values())
    facts |= {"solvers": [task.digest for task in solving]} if solving else {}
    scored: list[Task] = []
    if scores:
        payload = {**builder.shared, **place}
        scored = score_tasks(checkpoint, shared=payload, solvers=solving, **shared)
        facts["scored"] = {
            side: [task.digest for task in scored if task.payload["side"] == side]
            for side in ("before", "after")
        }
    return _RunTasks(
        tasks=(*tasks, *scored), solvers=solvers, last=tuple(task.id for task in scored), facts=facts
    )


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
        "train": shard_contents(data.train),
        "eval": shard_contents(data.eval),
        "loss": data.loss,
        "metric": data.metric,
    }


def _has_gradients(model: Model) -> bool:
    """Whether a step of the recipe computes gradients, which a GPU may do."""
    recipe = model.recipe
    collects = recipe.prune is not None and needs_gradients(recipe.prune)
    return collects or recipe.auto is not None or recipe.train is not None or recipe.finetune is not None


def _trainers(model: Model, workers: int) -> int:
    """Data-parallel workers may change the last digits of trained weights, so they are part of a training digest."""
    trains = model.recipe.train is not None or model.recipe.finetune is not None
    return workers if trains else 1
