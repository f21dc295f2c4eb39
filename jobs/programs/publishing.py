"""The last step of a program: measure it, refuse it or publish it, and prove what was published.

The numbers of `after` are those of the bytes that are published: they are loaded again before anything is measured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.export import ExportedProgram

from fleetpress.compression.confidence import Difference, difference, sample_sums, value_of
from fleetpress.compression.cost import macs, parameters
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.layers import layers
from fleetpress.compression.metrics import METRICS, Sums, allowed_drop
from fleetpress.compression.program import aliases, bind, tensors, trainable
from fleetpress.compression.pruning.units import PRUNABLE_KINDS
from fleetpress.compression.selection import Layer
from fleetpress.compression.smoke import smoke_inputs
from fleetpress.storage.artifact import write_artifact
from fleetpress.storage.store import open_store

from ..handover import Payload, record
from ..manifest import companions, complete
from ..tasks import StepResult
from ..validation import Quality, drop_facts, refusal
from . import zeroing
from .assembling import Candidate, assembled
from .biases import uncorrected
from .latency import latency_ms
from .materials import (
    arrays,
    source_program,
    trained_program,
)
from .objective import (
    is_fidelity,
    measured,
    metric_name,
)
from .quantizing import quantized_layers

_LATENCY_SECONDS = 0.1  # spent on each of three measurements of a model


def publish(payload: Payload) -> StepResult:
    """Assemble the compressed program, compare it with the original, and publish it unless it lost too much."""
    candidate = assembled(payload)
    metrics, verdict = _metrics(payload, candidate)
    if verdict:
        return StepResult(result={"state": "rejected", "reason": verdict, "metrics": metrics})
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    files = {candidate.file: candidate.data, **companions(payload, metrics)}
    written = write_artifact(store, name, digest, files)  # reads back: what is stored are these bytes
    return complete(payload, metrics, kind="program", form=candidate.form, files=written)


def _metrics(payload: Payload, candidate: Candidate) -> tuple[dict[str, Any], str | None]:
    """Everything measured, and the reason to reject the model, if there is one."""
    source, folded = Runner(source_program(payload)), Runner(candidate.served)
    quality = _compare(
        payload, source, folded
    )  # before any number of timed calls: a program may keep a state
    before: dict[str, Any] = {"bytes": payload["model"]["files"][0]["bytes"], **_cost(source, source.program)}
    after: dict[str, Any] = {"bytes": len(candidate.data), **_cost(folded, candidate.plain)}
    if candidate.loaded is not candidate.served:
        after["latency_packed_ms"] = call_ms(Runner(candidate.loaded))
    verdict = _over_budget(payload, after)
    if quality is not None:
        told_before, told_after = quality.facts()
        before |= told_before
        after |= told_after
        verdict = verdict or quality.verdict
    warnings = [f"ignore {entry!r} matches no layer" for entry in quantized_layers(payload)[2]]
    warnings += [*zeroing.warnings(payload), *payload.get("warnings", ())]
    if quality is None:
        warnings.append("quality was not measured: the model has no eval data")
    sparse: dict[str, int] = {}
    if candidate.weight_bytes is None:
        sparse = zeroing.float_bytes(payload, tensors(candidate.plain), quantized_layers(payload)[0])
    metrics = {
        "before": before,
        "after": after,
        "compression_ratio": round(before["bytes"] / after["bytes"], 4),
        "bits_per_weight": _bits_per_weight(payload, candidate, sparse),
        "layers": _layer_metrics(payload, candidate, sparse),
        "warnings": warnings,
        **payload.get("told", {}),
    }
    return metrics, verdict


def _over_budget(payload: Payload, after: Mapping[str, Any]) -> str | None:
    """Why a model that was searched for within a budget is rejected, if it is."""
    search = payload.get("told", {}).get("search", {})
    budget, cost = search.get("budget"), search.get("cost")
    if budget is None or after[cost] <= budget:
        return None
    return (
        f"{cost} are {after[cost]:g}, over the budget of {budget:g}; allow more, more trials, or fine-tuning"
    )


def _cost(runner: Runner, plain: ExportedProgram) -> dict[str, Any]:
    return {"parameters": parameters(plain), "macs": macs(plain), "latency_ms": call_ms(runner)}


def call_ms(runner: Runner) -> float:
    """How long one call with one sample takes, in milliseconds."""
    args, kwargs = bind(runner.program, smoke_inputs(runner.program, batch=1))
    return latency_ms(runner.module, args, kwargs, limit_seconds=_LATENCY_SECONDS)


def _compare(payload: Payload, source: Runner, compressed: Runner) -> Quality | None:
    """The source, or the trained program if better, and the compressed one on the eval data; None without such data."""
    data = payload["data"]
    if data is None or not data["eval"]:
        return None
    samples = measured(data, arrays(data["eval"]))
    trained = trained_program(payload)
    name = metric_name(data, samples, source.program)

    def sums(runner: Runner) -> list[Sums]:
        return sample_sums(runner, samples, name, reference=source if is_fidelity(name) else None)

    original = sums(source)
    best, stage = value_of(name, original), "source"
    if math.isnan(best):
        raise DataMismatchError(
            f"{name} of the original model on the eval data is not a number; look for NaN or infinity in the data"
        )
    if trained is not source.program:
        retrained = sums(Runner(trained))
        value = value_of(name, retrained)
        if value != best and (value > best) == METRICS[name].higher_is_better:
            original, best, stage = retrained, value, "trained"
    found = difference(name, original, sums(compressed), seed=payload["seed"])
    return Quality(
        metric=name,
        before=best,
        stage=stage,
        after=found.after,
        drop=drop_facts(found),
        verdict=_verdict(payload, name, found),
    )


def _verdict(payload: Payload, name: str, found: Difference) -> str | None:
    """Why the model is rejected, if it is. What was chosen by a search must hold with one standard error to spare."""
    limit = payload["recipe"]["validate"]["max_drop"]
    if refused := refusal(name, found, limit, "prune less, use more bits, or train longer"):
        return refused
    bound = found.drop + found.standard_error
    if "told" in payload and bound > allowed_drop(found.before, limit):
        return (
            f"{name} went from {found.before:.4f} to {found.after:.4f}: with one standard error of "
            f"{found.standard_error:.4f} more than max_drop {limit} allows; give more eval data, or allow more"
        )
    return None


def _layer_metrics(payload: Payload, candidate: Candidate, sparse: Mapping[str, int]) -> list[dict[str, Any]]:
    """One entry per layer of the original, with what was done to it and why something was not.

    `sparse` are the bytes of floats that a `.pt2` holds without their zeros.
    """
    stages = payload["stages"]
    pruned = (
        record(payload, stages["prune"]).result
        if "prune" in stages
        else {"removed": {}, "units": {}, "skipped": {}}
    )
    weights, unquantized, _ = quantized_layers(payload)
    without = uncorrected(payload)
    sparsity = zeroing.layer_sparsity(payload)
    source, left = tensors(source_program(payload)), tensors(candidate.plain)
    stored = {name: value.nbytes for name, value in left.items()} | dict(sparse)
    found = []
    for layer in layers(source_program(payload)):
        removed = pruned["removed"].get(layer.name, [])
        units = pruned["units"].get(layer.name)
        mine = [facts for facts in weights.values() if facts["layer"] == layer.name]
        reasons = []
        touched = {*pruned["units"], *sparsity} - pruned["skipped"].keys()
        if "prune" in stages and not removed and layer.name not in touched:
            what = _not_pruned(layer) if not sparsity else "not among the targets"
            reasons.append(f"prune: {pruned['skipped'].get(layer.name) or what}")
        if reason := pruned.get("uncompensated", {}).get(layer.name):
            reasons.append(f"compensate: {reason}")
        if left.keys().isdisjoint(layer.weights):
            reasons.append("prune: nothing reads its outputs, so its weights are no longer stored")
        elif "quantize" in stages and not mine:
            reasons.append(f"quantize: {unquantized.get(layer.name, 'not among the targets')}")
        reasons += [f"reads floats: {facts['reads_floats']}" for facts in mine[:1] if "reads_floats" in facts]
        if layer.name in without:
            reasons.append(f"bias_correction: {without[layer.name]}")
        found.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "sparsity": round(len(removed) / units, 6) if units else sparsity.get(layer.name, 0.0),
                "removed_units": removed,
                **({"zeros": sparsity[layer.name]} if units and layer.name in sparsity else {}),
                "num_bits": mine[0]["scheme"]["num_bits"] if mine else None,
                **({"activation_bits": bits} if (bits := _activation_bits(mine)) else {}),
                "group_size": mine[0]["group_size"] if mine else None,
                "method": mine[0]["method"] if mine else None,
                "bytes_before": sum(source[name].nbytes for name in layer.weights),
                "bytes_after": _layer_bytes(layer, mine, stored, candidate.weight_bytes),
                "sqnr_db": _least(facts["sqnr_db"] for facts in mine),
                "skipped": "; ".join(reasons) or None,
            }
        )
    return found


def _activation_bits(weights: list[dict[str, Any]]) -> int | None:
    """Of a layer that runs on an integer kernel; None of all others."""
    return weights[0]["scheme"].get("activation_bits") if weights else None


def _not_pruned(layer: Layer) -> str:
    if layer.kind in PRUNABLE_KINDS:
        return "not among the targets"
    return f"units of a {layer.kind} layer cannot be deleted"


def _layer_bytes(
    layer: Layer,
    quantized: Sequence[Mapping[str, Any]],
    stored: Mapping[str, int],
    coded: Mapping[str, int] | None,
) -> int:
    """Bytes of a layer's weights in the file, none if they went; in a `.pt2` before it is packed as a whole."""
    if coded is not None:
        return sum(coded.get(name, 0) for name in layer.weights)
    if quantized:
        return sum(facts["bytes_after"] for facts in quantized)
    return sum(stored.get(name, 0) for name in layer.weights)


def _bits_per_weight(payload: Payload, candidate: Candidate, sparse: Mapping[str, int]) -> float:
    """Stored bits of all parameters, scales and zero points counted, over their number."""
    final, coded = candidate.plain, candidate.weight_bytes
    stored = {name: final.state_dict[name] for name in trainable(final)}
    tied = aliases(stored)
    state = sum(
        value.nbytes if coded is None else coded[name] for name, value in stored.items() if name not in tied
    )
    if coded is None:
        weights = quantized_layers(payload)[0]
        state -= sum(facts["bytes_before"] - facts["bytes_after"] for facts in weights.values())
        values = tensors(final)
        state -= sum(values[name].nbytes - size for name, size in sparse.items())
    return float(round(8 * state / max(1, parameters(final)), 4))


def _least(values: Iterable[float | None]) -> float | None:
    """The smallest of what is known: a weight without quantization noise has no ratio to it."""
    return min((value for value in values if value is not None), default=None)
