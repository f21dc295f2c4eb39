"""What a recipe would do to a program, told from its graph and the shapes of its weights."""

from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.pruning import PRUNERS, PruneOptions, delete, find_units, prune
from fleetpress.compression.quantization.weight import predicted_bytes
from fleetpress.storage.programs import weights_skeleton
from fleetpress.storage.store import open_store

from .fleet import Model, absolute
from .quantizing import choose
from .schemes import scheme_label, scheme_of


def program_facts(model: Model, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `PlannedModel`: layers and what is done to them, exact bytes, warnings. Reads no weights."""
    file = model.source.files[0]
    program, read = weights_skeleton(open_store(absolute(model.source.root)), file.path, file.etag)
    before = {layer.name: layer.kind for layer in layers(program)}
    pruned, notes, skipped, warnings = _pruned(program, recipe.get("prune"))
    quantized: dict[str, str] = {}
    size: int | None = None
    if "quantize" in recipe:
        scheme = scheme_of(recipe["quantize"])
        choice = choose(pruned or program, recipe["quantize"])
        quantized = {layer.name: scheme_label(scheme) for layer in choice.layers}
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
    if recipe.get("format") == "archive":
        size = None
        warnings += ("format archive codes weights by their entropy, so the bytes out are not known yet",)
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
    return {"quantized_bytes": size, "header_bytes": read, "layers": rows, "warnings": warnings}


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
