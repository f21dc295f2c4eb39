"""What a recipe would do to a program, told from its graph and the shapes of its weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.export import ExportedProgram

from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.pruning import PRUNERS, delete, find_units, prune
from fleetpress.compression.quantization.sparse_weight import most_bytes
from fleetpress.compression.quantization.weight import predicted_bytes
from fleetpress.compression.sparsity import is_sparsifier
from fleetpress.compression.sparsity.zero_layers import least_zeros
from fleetpress.storage.programs import weights_skeleton
from fleetpress.storage.store import open_store

from ..planning.fleet import Model, absolute
from ..programs.pruning import prune_options
from ..programs.quantizing import (
    choose,
    every_layer,
    schemes_of,
)
from ..spec.schemes import scheme_label, zeroing_label

_BY_AUTO = "by auto"


def program_facts(model: Model, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `PlannedModel`: layers and what is done to them, exact bytes, warnings. Reads no weights."""
    file = model.source.files[0]
    program, read = weights_skeleton(open_store(absolute(model.source.root)), file.path, file.etag)
    before = {layer.name: layer.kind for layer in layers(program)}
    prune_step = recipe.get("prune")
    zeros: dict[str, int] = {}
    if prune_step is not None and is_sparsifier(prune_step["method"]):
        zeros, notes, skipped, warnings = _zeroed(program, prune_step)
        pruned: ExportedProgram | None = program
    else:
        pruned, notes, skipped, warnings = _pruned(program, prune_step)
    quantized: dict[str, str] = {}
    size: int | None = None
    if "quantize" in recipe:
        choice = choose(pruned or program, recipe["quantize"])
        schemes, on_floats = schemes_of(pruned or program, choice.layers, recipe["quantize"])
        quantized = {name: scheme_label(scheme) for name, scheme in schemes.items()}
        skipped = skipped | {name: f"quantize: {reason}" for name, reason in choice.skipped.items()}
        skipped |= {name: f"reads floats: {reason}" for name, reason in on_floats.items()}
        warnings += tuple(f"ignore {entry!r} matches no layer" for entry in choice.unused_ignores)
        if pruned is not None:
            values = tensors(pruned)
            owners = aliases(values)
            weights = {owners.get(name, name): layer for layer in choice.layers for name in layer.weights}
            size = sum(
                most_bytes(tuple(values[n].shape), layer.axis, schemes[layer.name], values[n].dtype, zeros[n])
                if n in zeros
                else predicted_bytes(tuple(values[n].shape), layer.axis, schemes[layer.name], values[n].dtype)
                for n, layer in weights.items()
            )
    if "auto" in recipe:
        notes, quantized, told = _searched(program)
        warnings += told
    elif recipe.get("format") == "archive":
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


def _searched(program: ExportedProgram) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Layers that a search may prune, those that it may quantize, and a warning."""
    units = {name: _BY_AUTO for group in find_units(program).groups for name in group.members}
    codes = {layer.name: _BY_AUTO for layer in every_layer(program)}
    return units, codes, ("auto chooses by what it measures, so the bytes out are not known yet",)


def _zeroed(
    program: ExportedProgram, options: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, str], dict[str, str], tuple[str, ...]]:
    """How many zeros each weight will have at least, notes and reasons by layer, and warnings."""
    choice = choose(program, options, step="prune")
    zeros, reasons = least_zeros(choice.layers, tensors(program), options)
    skipped = {name: f"prune: {reason}" for name, reason in {**choice.skipped, **reasons}.items()}
    labels = {
        layer.name: zeroing_label({**options, **options.get("layers", {}).get(layer.name, {})})
        for layer in choice.layers
        if layer.name not in reasons
    }
    notes = {name: label for name, label in labels.items() if label is not None}
    told = [f"ignore {entry!r} matches no layer" for entry in choice.unused_ignores]
    told.append("the bytes of sparse weights are the most it can be: codes may round to more zeros")
    return zeros, notes, skipped, tuple(told)


def _pruned(
    program: ExportedProgram, options: Mapping[str, Any] | None
) -> tuple[ExportedProgram | None, dict[str, str], dict[str, str], tuple[str, ...]]:
    """The program in its shapes after pruning (None: not known yet), notes and reasons by layer, and warnings."""
    if options is None:
        return program, {}, {}, ()
    told = (
        ("zeros grow in what is left, so the bytes out are the most it can be",) if "zeros" in options else ()
    )
    if (options.get("sparsity") is not None or options.get("layers")) and options["scope"] == "layer":
        # Which units go depends on scores, how many does not: any method without statistics gives the shapes.
        chosen = prune(program, replace(prune_options(options), method=_without_statistics()))
        notes = {
            name: f"{len(units)} of {chosen.units[name]} units" for name, units in chosen.removed.items()
        }
        return (
            delete(program, chosen.removed, options.get("structure", ())),
            notes,
            {k: f"prune: {v}" for k, v in chosen.skipped.items()},
            told,
        )
    units = find_units(program, *(options.get(key, ()) for key in ("targets", "ignore", "structure")))
    notes = {name: "by its scores" for name in units.owners if name not in units.skipped}
    skipped = {name: f"prune: {reason}" for name, reason in units.skipped.items()}
    return (
        None,
        notes,
        skipped,
        ("how many units are pruned depends on their scores, so the bytes out are not known yet",),
    )


def _without_statistics() -> str:
    return next(
        name for name, method in PRUNERS.items() if not method.needs_gradients and not method.needs_inputs
    )
