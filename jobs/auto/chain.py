"""The steps of an ordinary recipe, one after the other in this process: what a trial and the last step build on.

Every step is recorded under its own digest, as if a plan had asked for it, so that what two trials share is done once,
and a search that was interrupted goes on where it was.
"""

import time
from collections.abc import Mapping
from typing import Any

from fleetpress.storage.sources import ModelSource, SourceFile
from fleetpress.storage.store import open_store

from ..handover import Payload
from ..ledger import Ledger
from ..planning.fleet import (
    Data,
    Fold,
    Model,
    Shard,
)
from ..planning.plan import plan_program
from ..programs.steps import STEPS
from ..spec.checks import needs_gradients, needs_inputs
from ..spec.recipe import Recipe
from ..tasks import Task, TaskRecord
from ..worker import record_of


def built(payload: Payload, recipe: Mapping[str, Any], fold: Fold | None = None) -> Payload:
    """Do the recipe's steps up to the last, on the train data of the `fold` alone; the payload of the last step.

    Its `stages` name what was made: `final_program` and the quantized weights follow from it.
    """
    asked = payload["recipe"]
    steps = {**recipe, **{name: asked[name] for name in ("train", "validate", "format") if name in asked}}
    parsed = Recipe.model_validate(steps)
    plan = plan_program(
        _model(payload, parsed),
        output=payload["output"],
        run=payload["run"],
        seed=payload["seed"],
        workers=payload["trainers"],
        memory_bytes=payload["memory_bytes"],
        gradients=parsed.prune is not None and needs_gradients(parsed.prune),
        inputs=parsed.quantize is not None and needs_inputs(parsed.quantize),
        gpus=payload["gpus"],
        fold=fold,
    )
    ledger = Ledger(open_store(payload["output"]))
    for task in plan.tasks[:-1]:
        if ledger.find(task.digest) is None:
            ledger.write(_done(task))
    return plan.tasks[-1].payload


def _done(task: Task) -> TaskRecord:
    started = time.perf_counter()
    made = STEPS[task.kind](task.payload)
    return record_of(task, made, 1, {"seconds": round(time.perf_counter() - started, 6)})


def _model(payload: Payload, recipe: Recipe) -> Model:
    """The model that the payload was made of, with another recipe."""
    facts, data = payload["model"], payload["data"]
    return Model(
        name=facts["name"],
        source=ModelSource(
            name=facts["name"],
            kind=facts["kind"],
            uri=facts["uri"],
            root=facts["root"],
            files=tuple(SourceFile(**file) for file in facts["files"]),
        ),
        recipe=recipe,
        data=Data(
            name="",
            train=tuple(_shard(file) for file in data["train"]),
            eval=tuple(_shard(file) for file in data["eval"]),
            loss=data["loss"],
            metric=data["metric"],
        ),
        factory=facts["factory"],
        inputs=facts["inputs"],
        factory_digest=facts.get("factory_digest"),
    )


def _shard(file: Mapping[str, Any]) -> Shard:
    return Shard(
        root=file["root"], file=SourceFile(path=file["path"], etag=file["etag"], bytes=file["bytes"])
    )
