"""What a spec would do, before it is done: from listings and headers only, no weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram

from fleetpress.compression.errors import CompressionError
from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.pruning import PRUNERS, PruneOptions, delete, find_units, prune
from fleetpress.compression.quantization.weight import predicted_bytes
from fleetpress.compression.scheme import QuantScheme
from fleetpress.storage.artifact import manifest_exists
from fleetpress.storage.checkpoint import open_checkpoint
from fleetpress.storage.errors import StorageError
from fleetpress.storage.programs import weights_skeleton
from fleetpress.storage.store import open_store

from .checkpoint_choice import choose as choose_tensors
from .checkpoint_forecast import forecast
from .checkpoint_layout import plan_shards, stored_bytes
from .errors import FleetpressError
from .fleet import Model, absolute, resolve
from .ledger import Ledger
from .plan import artifact_digest
from .quantizing import choose
from .run import plan_model
from .schemes import scheme_of
from .spec import Spec


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """One model of the plan. Bytes: of the source, to be read in all, and of the quantized weights that come out.

    `quantized_bytes` is exact (packed codes, scales, zero points); None if nothing is quantized, or if what is pruned
    depends on statistics that do not exist yet. `header_bytes` were read to know all this. `forecast` tells of a
    checkpoint every shard's exact bytes, requests and memory (`checkpoint_forecast.Forecast`).
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
    """The plan of a fleet, and what stands in its way."""

    name: str
    output: str
    models: tuple[PlannedModel, ...]
    problems: tuple[Mapping[str, str], ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """0 without problems; 3 if some models cannot be done, 4 if none can."""
        if not self.problems:
            return 0
        return 3 if self.models else 4

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "output": self.output,
            "models": [
                {**vars(model), "layers": [dict(layer) for layer in model.layers]} for model in self.models
            ],
            "problems": [dict(problem) for problem in self.problems],
        }


def preview(spec: Spec, *, allow_code: bool = False) -> Preview:
    """Plan every model of the spec. Problems are collected, never raised, except those of the output itself."""
    fleet = resolve(spec, allow_code=allow_code)
    problems = [{"model": problem.model, "reason": problem.reason} for problem in fleet.problems]
    done = Ledger(open_store(absolute(spec.output))).known()
    planned = []
    for model in fleet.models:
        try:
            planned.append(_planned(model, spec, done))
        except (CompressionError, StorageError, FleetpressError) as error:
            problems.append({"model": model.name, "reason": str(error)})
    return Preview(name=spec.name, output=spec.output, models=tuple(planned), problems=tuple(problems))


def _planned(model: Model, spec: Spec, done: set[str]) -> PlannedModel:
    digest = artifact_digest(model, seed=spec.seed, workers=spec.resources.workers)
    source_bytes = sum(file.bytes for file in model.source.files)
    shared: dict[str, Any] = {"name": model.name, "kind": model.source.kind, "source_bytes": source_bytes}
    if manifest_exists(open_store(absolute(spec.output)), model.name, digest):
        return PlannedModel(**shared, state="unchanged", tasks=0, read_bytes=0)
    plan = plan_model(model, spec, run="plan")
    shared |= {
        "state": "planned",
        "tasks": sum(task.digest not in done for task in plan.tasks),
        "read_bytes": source_bytes + _data_bytes(model),
    }
    recipe = model.recipe.canonical()
    if model.source.kind == "checkpoint":
        return _planned_checkpoint(model, recipe, shared, spec.resources.memory_per_task_bytes)
    if model.source.kind == "program":
        return _planned_program(model, recipe, shared)
    return PlannedModel(**shared, warnings=("a module's layers are known when its factory has been run",))


def _planned_program(model: Model, recipe: Mapping[str, Any], shared: Mapping[str, Any]) -> PlannedModel:
    file = model.source.files[0]
    program, read = weights_skeleton(open_store(absolute(model.source.root)), file.path, file.etag)
    before = {layer.name: layer.kind for layer in layers(program)}
    pruned, notes, skipped, warnings = _pruned(program, recipe.get("prune"))
    quantized: dict[str, str] = {}
    size: int | None = None
    if "quantize" in recipe:
        scheme = scheme_of(recipe["quantize"])
        choice = choose(pruned or program, recipe["quantize"])
        quantized = {layer.name: _scheme_label(scheme) for layer in choice.layers}
        skipped = skipped | {name: f"quantize: {reason}" for name, reason in choice.skipped.items()}
        warnings += tuple(f"ignore {entry!r} matches no layer" for entry in choice.unused_ignores)
        if pruned is not None:
            values = tensors(pruned)
            owners = aliases(values)
            weights = {
                owners.get(name, name): layer.axis for layer in choice.layers for name in layer.weights
            }
            size = sum(
                predicted_bytes(tuple(values[n].shape), axis, scheme, values[n].dtype)
                for n, axis in weights.items()
            )
    rows = tuple(
        {
            "name": name,
            "kind": kind,
            "prune": notes.get(name),
            "quantize": quantized.get(name),
            "skipped": skipped.get(name),
        }
        for name, kind in before.items()
    )
    return PlannedModel(**shared, quantized_bytes=size, header_bytes=read, layers=rows, warnings=warnings)


def _pruned(
    program: ExportedProgram, options: Mapping[str, Any] | None
) -> tuple[ExportedProgram | None, dict[str, str], dict[str, str], tuple[str, ...]]:
    """The program in its shapes after pruning (None: not known yet), notes and reasons by layer, and warnings."""
    if options is None:
        return program, {}, {}, ()
    if options.get("sparsity") is not None and options["scope"] == "layer":
        # Which units go depends on scores, how many does not: any method without statistics gives the shapes.
        chosen = prune(program, PruneOptions(**{**options, "method": _without_statistics()}))
        notes = {
            name: f"{len(units)} of {chosen.units[name]} units" for name, units in chosen.removed.items()
        }
        return (
            delete(program, chosen.removed),
            notes,
            {k: f"prune: {v}" for k, v in chosen.skipped.items()},
            (),
        )
    units = find_units(program, tuple(options.get("targets", ())), tuple(options.get("ignore", ())))
    notes = {name: "by its scores" for group in units.groups for name in group.members}
    skipped = {name: f"prune: {reason}" for name, reason in units.skipped.items()}
    return (
        None,
        notes,
        skipped,
        ("how many units are pruned depends on their scores, so the bytes out are not known yet",),
    )


def _without_statistics() -> str:
    return next(name for name, method in PRUNERS.items() if not method.needs_gradients)


def _planned_checkpoint(
    model: Model, recipe: Mapping[str, Any], shared: Mapping[str, Any], memory_bytes: int
) -> PlannedModel:
    choice = choose_tensors(open_checkpoint(model.source.uri), recipe)
    expected = forecast(plan_shards(choice.items), memory_bytes)
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
                "prune": _zeroing_label(dict(treatment.sparsity)),
                "quantize": _scheme_label(treatment.scheme) if treatment.scheme else treatment.cast,
                "skipped": choice.skipped.get(item.layer),
            }
        )
    return PlannedModel(
        **{**shared, "read_bytes": expected.read_bytes},
        quantized_bytes=size,
        forecast=expected.as_dict(),
        layers=tuple(rows),
        warnings=choice.warnings,
    )


def _zeroing_label(options: Mapping[str, Any]) -> str | None:
    if not options:
        return None
    return f"{options['pattern']} kept" if "pattern" in options else f"{options['sparsity']:.0%} zeroed"


def _scheme_label(scheme: QuantScheme) -> str:
    group = f" g{scheme.group_size}" if scheme.group_size else f" {scheme.strategy}"
    return f"{scheme.num_bits} bits{'' if scheme.symmetric else ' asym'}{group}"


def _data_bytes(model: Model) -> int:
    if model.data is None:
        return 0
    return sum(shard.file.bytes for shard in (*model.data.train, *model.data.eval))
