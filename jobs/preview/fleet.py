"""What a spec would do, before it is done: from listings and headers only, no weight is read."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from fleetpress.compression.errors import CompressionError
from fleetpress.storage.checkpoint import open_checkpoint
from fleetpress.storage.errors import UNUSABLE_STORE, StorageError
from fleetpress.storage.local_files import check_writable
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import is_s3

from ..checkpoint.choice import choose
from ..checkpoint.forecast import forecast
from ..checkpoint.layout import plan_shards, stored_bytes
from ..driver.run import (
    digests_of,
    fleet_of,
    plan_model,
)
from ..errors import FleetpressError
from ..ledger import Ledger
from ..planning.fleet import (
    Model,
    absolute,
    resolve,
)
from ..runs.published import find_published
from ..spec.fleet_spec import Spec
from ..spec.schemes import scheme_label, zeroing_label
from ..tasks import Task
from .request_count import unchanged_requests


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """One model of the plan. Bytes: of the source, to be read in all, and of the quantized weights that come out.

    `quantized_bytes` is exact (packed codes, scales, zero points); None if nothing is quantized, or if what is pruned
    depends on statistics that do not exist yet. `header_bytes` were read to know all this. `forecast` tells of a
    checkpoint every shard's exact bytes, requests and memory (`checkpoint.forecast.Forecast`).
    """

    name: str
    kind: str
    state: str
    tasks: int
    source_bytes: int
    read_bytes: int
    quantized_bytes: int | None = None
    header_bytes: int = 0
    forecast: Mapping[str, Any] | None = None
    layers: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The plan of a fleet, and what stands in its way.

    `requests` are those of a run, by kind, if it has nothing to do (`request_count.unchanged_requests`); else None.
    """

    name: str
    output: str
    models: tuple[PlannedModel, ...]
    problems: tuple[Mapping[str, Any], ...] = field(default=())
    requests: Mapping[str, int] | None = None

    @property
    def exit_code(self) -> int:
        """0 without problems; 3 if some models cannot be done, 4 if none can, 5 if none because of the storage."""
        if not self.problems:
            return 0
        if self.models:
            return 3
        return 5 if all(problem["unreachable"] for problem in self.problems) else 4

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "output": self.output,
            "models": [
                {**vars(model), "layers": [dict(layer) for layer in model.layers]} for model in self.models
            ],
            "problems": [dict(problem) for problem in self.problems],
            "requests": None if self.requests is None else dict(self.requests),
        }


def preview(spec: Spec, *, allow_code: bool = False) -> Preview:
    """Plan every model of the spec. Problems are collected, never raised, except those of the output itself."""
    if not is_s3(spec.output):
        check_writable(absolute(spec.output))
    fleet = resolve(spec, allow_code=allow_code)
    problems = [_problem(problem.model, problem.reason, problem.unreachable) for problem in fleet.problems]
    store = open_store(absolute(spec.output))
    digests = digests_of(fleet.models, spec)
    together = fleet_of(fleet.models, spec)
    there = find_published(store, digests)
    done = Ledger(store).known() if len(there) < len(digests) else set()
    planned = []
    for model in fleet.models:
        try:
            planned.append(
                _unchanged(model) if model.name in there else _planned(model, spec, done, together)
            )
        except (CompressionError, StorageError, FleetpressError) as error:
            problems.append(_problem(model.name, str(error), isinstance(error, UNUSABLE_STORE)))
    nothing_to_do = bool(digests) and len(there) == len(digests) and not problems
    return Preview(
        name=spec.name,
        output=spec.output,
        models=tuple(planned),
        problems=tuple(problems),
        requests=unchanged_requests(spec, store, digests) if nothing_to_do else None,
    )


def _problem(model: str, reason: str, unreachable: bool) -> dict[str, Any]:
    return {"model": model, "reason": reason, "unreachable": unreachable}


def _shared(model: Model) -> dict[str, Any]:
    source_bytes = sum(file.bytes for file in model.source.files)
    return {"name": model.name, "kind": model.source.kind, "source_bytes": source_bytes}


def _unchanged(model: Model) -> PlannedModel:
    return PlannedModel(**_shared(model), state="unchanged", tasks=0, read_bytes=0)


def _planned(model: Model, spec: Spec, done: Set[str], fleet: str | None) -> PlannedModel:
    plan = plan_model(model, spec, run="plan", fleet=fleet)
    shared = _shared(model)
    shared |= {
        "state": "planned",
        "tasks": sum(task.digest not in done for task in plan.tasks),
        "read_bytes": shared["source_bytes"] + _data_bytes(model),
    }
    recipe = model.recipe.canonical()
    if model.source.kind == "checkpoint":
        return _planned_checkpoint(model, plan.tasks, shared, spec.resources.memory_per_task_bytes)
    if model.source.kind == "program":
        from .program import program_facts

        return PlannedModel(**shared, **program_facts(model, recipe))
    return PlannedModel(**shared, warnings=("a module's layers are known when its factory has been run",))


def _planned_checkpoint(
    model: Model, tasks: Sequence[Task], shared: Mapping[str, Any], memory_bytes: int
) -> PlannedModel:
    choice = choose(open_checkpoint(model.source.uri), model.recipe.canonical())
    expected = forecast(
        plan_shards(choice.items), memory_bytes, planned=tasks, source_bytes=shared["source_bytes"]
    )
    rows = []
    size = 0
    for item in choice.items:
        if item.layer is None:
            continue
        treatment = item.treatment
        if treatment.scheme is not None:
            size += sum(map(stored_bytes, item.stored))
        rows.append(
            {
                "name": item.layer,
                "kind": next(layer.kind for layer in choice.known if layer.name == item.layer),
                "prune": zeroing_label(dict(treatment.sparsity)),
                "quantize": scheme_label(treatment.scheme) if treatment.scheme else treatment.cast,
                "skipped": choice.skipped.get(item.layer),
            }
        )
    return PlannedModel(
        **{**shared, "read_bytes": expected.read_bytes + expected.run_bytes},
        quantized_bytes=size,
        forecast=expected.as_dict(),
        layers=tuple(rows),
        warnings=choice.warnings,
    )


def _data_bytes(model: Model) -> int:
    if model.data is None:
        return 0
    return sum(shard.file.bytes for shard in (*model.data.train, *model.data.eval))
