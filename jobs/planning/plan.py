"""What has to be done to a model, as tasks: which, in which order, and under which digests. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fleetpress.compression.rounds import epochs_of
from fleetpress.compression.sparsity import is_sparsifier
from fleetpress.storage.checkpoint import Checkpoint

from ..checkpoint.choice import Choice, check_plain, choose
from ..checkpoint.layout import plan_shards
from ..checkpoint.tasks import checkpoint_tasks
from ..digests import VERSIONS, contents, digest
from ..spec.checks import (
    needs_gradients,
    needs_inputs,
    needs_products,
    observes,
    trains_from_codes,
)
from ..spec.recipe import (
    DEFAULT_FORMAT,
    CalibrateStep,
    PruneStep,
    Recipe,
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
_SEARCH = ("sense", "trial", "ladder")  # versions that decide on what a search publishes


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
        **({"search": [VERSIONS[name] for name in _SEARCH]} if model.recipe.auto is not None else {}),
        **({"solved": [VERSIONS["observe"], VERSIONS["solve"]]} if _looks_at_inputs(model.recipe) else {}),
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
    that the quantization method reads calibration statistics: they are collected before finetune where weights are
    trained for their codes, since training starts from those that the method finds. What comes after `train` sees no
    sample outside the `fold`, if there is one.
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
    is_early = inputs and trains_from_codes(model.recipe)
    _add_rounds(builder, gradients=gradients, workers=workers, more=more, calibrates=is_early)
    if inputs and not is_early:
        builder.add_chunks("calibrate", recipe["calibrate"], shards=builder.train_shards)
    if recipe.get("quantize", {}).get("equalize"):
        builder.add("equalize", options=recipe["quantize"])
    if "quantize" in recipe:
        builder.add_groups("quantize", recipe["quantize"])
    return ModelPlan(model=model, digest=final, tasks=builder.finish("publish", final))


def _add_rounds(
    builder: PlanBuilder, *, gradients: bool, workers: int, more: dict[str, Any], calibrates: bool
) -> None:
    """Tasks from collect to finetune, once or round by round; `more` is what is collected beside gradients.

    `calibrates` says that the last fine-tuning reads calibration statistics.
    """
    recipe, prune, seed = builder.shared["recipe"], builder.model.recipe.prune, builder.shared["seed"]
    rounds = recipe.get("prune", {}).get("rounds", 1)
    for index in range(rounds):
        if rounds > 1:
            builder.begin_round(index)
        statistics: list[Callable[[], None]] = []
        if gradients and (index or "collect" in recipe or "train" not in recipe or builder.unlabelled):
            options = recipe.get("collect", {"batch_size": 64})
            statistics.append(partial(builder.add_chunks, "collect", options, **more))
        if prune is not None and observes(prune):
            options, shards = recipe["calibrate"], builder.train_shards
            statistics.append(partial(builder.add_chunks, "calibrate", options, "observe", shards=shards))
        builder.add_together(*statistics)
        if "prune" in recipe and not is_gradual(recipe):
            builder.add("prune", options=recipe["prune"], seed=seed, **builder.round)
        if "finetune" in recipe:
            is_last = index == rounds - 1
            if is_last and calibrates:
                builder.add_chunks("calibrate", recipe["calibrate"], shards=builder.train_shards)
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
    effort = {name: value for name, value in options.items() if name in ("folds", "epochs")}
    builder.add_groups("sense", {"of": "operations"} if counts_operations(options) else effort)
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


def _more_statistics(step: PruneStep | None) -> dict[str, Any]:
    """What is collected beside gradients, or of single weights instead: facts of their own, so that digests of all else
    stay as they were.
    """
    if step is None:
        return {}
    wanted = {
        "products": needs_products(step),
        "recurrent": "recurrent" in step.structure,
        "weights": is_sparsifier(step.method),
    }
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
    """Tasks of a checkpoint: advance* and solve* by turns if it is calibrated, open?, convert*, finish*, score*,
    assemble.

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
    runs = _Runs(model, checkpoint, choice, builder, {**place, "artifact": final}, memory_bytes=memory_bytes)
    builder.tasks = runs.calibration()
    tasks, records = checkpoint_tasks(
        plan_shards(choice.items), artifact=final, place=place, solvers=runs.solvers, **shared
    )
    builder.tasks += tasks
    written = tuple(task.id for task in tasks if task.digest in records)
    scored = runs.scores(written)
    builder.tasks += scored
    builder.last = written + tuple(task.id for task in scored)
    return ModelPlan(
        model=model,
        digest=final,
        tasks=builder.finish("assemble", final, shard_records=records, **runs.facts),
    )


class _Runs:
    """Tasks that run a checkpoint; `solvers` make its matrices, by name, `facts` are what the last task knows."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        choice: Choice,
        builder: PlanBuilder,
        place: Mapping[str, Any],
        *,
        memory_bytes: int,
    ) -> None:
        self._checkpoint, self._choice, self._builder, self._place = checkpoint, choice, builder, place
        self._data, recipe = model.data, builder.shared["recipe"]
        self._scores = self._data is not None and bool(self._data.eval)
        self.solvers: Mapping[str, Task] = {}
        self.facts: dict[str, Any] = {}
        if not self._scores and choice.blocks is None:
            return
        assert self._data is not None, "checked by the spec: statistics need data"
        # What is measured in the end, and how much of it may be lost, changes nothing of what is done before.
        done = {step: chosen for step, chosen in recipe.items() if step != "validate"}
        trained_on = shard_contents(self._data.train)
        self._shared: dict[str, Any] = {
            "name": model.name,
            "work": digest("run", source=_identity(model)["source"], recipe=done, trained_on=trained_on),
            "options": recipe.get("calibrate") or CalibrateStep().model_dump(),
            "memory_bytes": memory_bytes,
        }

    def calibration(self) -> list[Task]:
        """Those that look at what layers read and solve them, if a method needs it."""
        if self._choice.blocks is None:
            return []
        # Behind torch: the plan of what is only converted does without.
        from ..checkpoint.calibrating import CalibrationPlanner, require_transformers

        require_transformers(self._checkpoint.uri)
        found = CalibrationPlanner(
            self._choice,
            self._checkpoint,
            self._builder.shared["data"]["train"],
            artifact=self._place["artifact"],
            place={key: value for key, value in self._place.items() if key != "artifact"},
            **self._shared,
        ).run()
        self.solvers = found.solvers
        solving = {task.digest: None for task in found.solvers.values()}
        self.facts |= {"spilled": found.digests, "solvers": list(solving)}
        return list(found.tasks)

    def scores(self, shards: Sequence[str]) -> list[Task]:
        """Those that measure it on held-out data, if there are any, when the tasks `shards` have written it."""
        if not self._scores:
            return []
        from ..checkpoint.calibrating import require_transformers
        from ..checkpoint.quality import score_tasks

        require_transformers(self._checkpoint.uri)
        payload = {**self._builder.shared, **self._place}
        tasks = score_tasks(self._checkpoint, shared=payload, shards=shards, **self._shared)
        self.facts["scored"] = {
            side: [task.digest for task in tasks if task.payload["side"] == side]
            for side in ("before", "after")
        }
        return tasks


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


def _looks_at_inputs(recipe: Recipe) -> bool:
    """Whether a method of the recipe looks at what layers read: its solver is part of what it is."""
    prune, quantize = recipe.prune, recipe.quantize
    return (prune is not None and observes(prune)) or (quantize is not None and needs_inputs(quantize))


def _trainers(model: Model, workers: int) -> int:
    """Data-parallel workers may change the last digits of trained weights, so they are part of a training digest."""
    trains = model.recipe.train is not None or model.recipe.finetune is not None
    return workers if trains else 1
