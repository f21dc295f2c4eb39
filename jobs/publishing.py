"""The last step of a program: measure it, refuse it or publish it, and prove what was published.

The numbers of `after` are those of the bytes that are published: they are loaded again before anything is measured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.cost import macs, parameters
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.evaluation import Runner, evaluate
from fleetpress.compression.layers import layers
from fleetpress.compression.metrics import METRICS, within
from fleetpress.compression.modes import eval_program
from fleetpress.compression.program import aliases, bind, tensors, trainable
from fleetpress.compression.pruning.units import PRUNABLE_KINDS
from fleetpress.compression.quantization.packed_program import pack_program, unpack_program
from fleetpress.compression.selection import Layer
from fleetpress.compression.smoke import smoke_inputs
from fleetpress.storage.artifact import write_artifact
from fleetpress.storage.coded_model import MODEL_FILE as CODED_FILE
from fleetpress.storage.errors import ArtifactCorrupt
from fleetpress.storage.programs import load_program, save_program
from fleetpress.storage.store import open_store

from .artifacts import MODEL as PROGRAM_FILE
from .coded_programs import coded_program, decoded_program, plain_program
from .handover import Payload, record
from .latency import latency_ms
from .manifest import companions, complete
from .materials import arrays, final_program, source_program, trained_program
from .objective import is_fidelity, measured, metric_name
from .quantizing import quantized_layers, quantized_weights
from .recipe import DEFAULT_FORMAT
from .tasks import StepResult

_LATENCY_SECONDS = 0.1  # spent on each of three measurements of a model


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """What would be published: the file, the program read back from it, the one it is over plain weights, and bytes.

    `plain` and `loaded` are the same program, if it runs on its plain weights; `weight_bytes` are those of each stored
    tensor in the file, where that is known better than from its shape.
    """

    file: str
    data: bytes
    loaded: ExportedProgram
    plain: ExportedProgram
    weight_bytes: Mapping[str, int] | None = None


def publish(payload: Payload) -> StepResult:
    """Assemble the compressed program, compare it with the original, and publish it unless it lost too much."""
    form = payload["recipe"].get("format", DEFAULT_FORMAT)
    candidate = (_coded if form == "archive" else _packed)(payload)
    metrics, verdict = _metrics(payload, candidate)
    if verdict:
        return StepResult(result={"state": "rejected", "reason": verdict, "metrics": metrics})
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    files = {candidate.file: candidate.data, **companions(payload, metrics)}
    written = write_artifact(store, name, digest, files)  # reads back: what is stored are these bytes
    return complete(payload, metrics, kind="program", form=form, files=written)


def _packed(payload: Payload) -> _Candidate:
    packed = pack_program(eval_program(final_program(payload)), quantized_weights(payload))
    data = save_program(packed)
    loaded = load_program(data)
    _prove(packed, Runner(loaded), payload)
    return _Candidate(file=PROGRAM_FILE, data=data, loaded=loaded, plain=unpack_program(loaded))


def _coded(payload: Payload) -> _Candidate:
    quantized = quantized_weights(payload)
    expected = plain_program(eval_program(final_program(payload)), quantized)
    data, sizes = coded_program(expected, quantized)
    loaded = decoded_program(data)
    _prove_tensors(expected, loaded, payload)
    _prove(expected, Runner(loaded), payload)
    return _Candidate(file=CODED_FILE, data=data, loaded=loaded, plain=loaded, weight_bytes=sizes)


def _metrics(payload: Payload, candidate: _Candidate) -> tuple[dict[str, Any], str | None]:
    """Everything measured, and the reason to reject the model, if there is one."""
    source, folded = Runner(source_program(payload)), Runner(candidate.plain)
    quality = _compare(
        payload, source, folded
    )  # before any number of timed calls: a program may keep a state
    before: dict[str, Any] = {"bytes": payload["model"]["files"][0]["bytes"], **_cost(source)}
    after: dict[str, Any] = {"bytes": len(candidate.data), **_cost(folded)}
    if candidate.loaded is not candidate.plain:
        after["latency_packed_ms"] = _latency(Runner(candidate.loaded))
    verdict = None
    if quality is not None:
        before |= {"metric": quality.metric, "value": _json(quality.before), "stage": quality.stage}
        after |= {"metric": quality.metric, "value": _json(quality.after)}
        verdict = quality.verdict
    warnings = [f"ignore {entry!r} matches no layer" for entry in quantized_layers(payload)[2]]
    if quality is None:
        warnings.append("quality was not measured: the model has no eval data")
    metrics = {
        "before": before,
        "after": after,
        "compression_ratio": round(before["bytes"] / after["bytes"], 4),
        "bits_per_weight": _bits_per_weight(payload, candidate),
        "layers": _layer_metrics(payload, candidate),
        "warnings": warnings,
    }
    return metrics, verdict


def _json(value: float) -> float | None:
    """JSON has no infinity, such as the psnr of outputs that are the targets, and no NaN."""
    return value if math.isfinite(value) else None


def _cost(runner: Runner) -> dict[str, Any]:
    program = runner.program
    return {"parameters": parameters(program), "macs": macs(program), "latency_ms": _latency(runner)}


def _latency(runner: Runner) -> float:
    args, kwargs = bind(runner.program, smoke_inputs(runner.program, batch=1))
    return latency_ms(runner.module, args, kwargs, limit_seconds=_LATENCY_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The metric on held-out data; `stage` says which model `before` is: the source, or the trained one if better."""

    metric: str
    before: float
    stage: str
    after: float
    verdict: str | None


def _compare(payload: Payload, source: Runner, compressed: Runner) -> Quality | None:
    """Original and compressed program on the eval data; None without such data."""
    data = payload["data"]
    if data is None or not data["eval"]:
        return None
    samples = measured(data, arrays(data["eval"]))
    trained = trained_program(payload)
    name = metric_name(data, samples, source.program)

    def value(program: ExportedProgram | Runner) -> float:
        return evaluate(program, samples, name, reference=source if is_fidelity(name) else None)

    best, stage = value(source), "source"
    if math.isnan(best):
        raise DataMismatchError(
            f"{name} of the original model on the eval data is not a number; look for NaN or infinity in the data"
        )
    if trained is not source.program:
        retrained = value(trained)
        if retrained != best and (retrained > best) == METRICS[name].higher_is_better:
            best, stage = retrained, "trained"
    after = value(compressed)
    limit = payload["recipe"]["validate"]["max_drop"]
    verdict = None
    if not within(name, best, after, limit):
        verdict = (
            f"{name} went from {best:.4f} to {after:.4f}, more than max_drop {limit} allows; "
            "prune less, use more bits, or train longer"
        )
    return Quality(metric=name, before=best, stage=stage, after=after, verdict=verdict)


def _layer_metrics(payload: Payload, candidate: _Candidate) -> list[dict[str, Any]]:
    """One entry per layer of the original, with what was done to it and why something was not."""
    stages = payload["stages"]
    pruned = (
        record(payload, stages["prune"]).result
        if "prune" in stages
        else {"removed": {}, "units": {}, "skipped": {}}
    )
    weights, unquantized, _ = quantized_layers(payload)
    source, left = tensors(source_program(payload)), tensors(candidate.plain)
    found = []
    for layer in layers(source_program(payload)):
        removed = pruned["removed"].get(layer.name, [])
        units = pruned["units"].get(layer.name)
        mine = [facts for facts in weights.values() if facts["layer"] == layer.name]
        reasons = []
        if "prune" in stages and not removed and layer.name not in pruned["units"].keys() - pruned["skipped"]:
            reasons.append(f"prune: {pruned['skipped'].get(layer.name) or _not_pruned(layer)}")
        if "quantize" in stages and not mine:
            reasons.append(f"quantize: {unquantized.get(layer.name, 'not among the targets')}")
        found.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "sparsity": round(len(removed) / units, 6) if units else 0.0,
                "removed_units": removed,
                "num_bits": mine[0]["scheme"]["num_bits"] if mine else None,
                "group_size": mine[0]["group_size"] if mine else None,
                "bytes_before": sum(source[name].nbytes for name in layer.weights),
                "bytes_after": _layer_bytes(layer, mine, left, candidate.weight_bytes),
                "sqnr_db": _least(facts["sqnr_db"] for facts in mine),
                "skipped": "; ".join(reasons) or None,
            }
        )
    return found


def _not_pruned(layer: Layer) -> str:
    if layer.kind in PRUNABLE_KINDS:
        return "not among the targets"
    return f"units of a {layer.kind} layer cannot be deleted"


def _layer_bytes(
    layer: Layer,
    quantized: Sequence[Mapping[str, Any]],
    left: Mapping[str, Tensor],
    coded: Mapping[str, int] | None,
) -> int:
    """Bytes of a layer's weights in the file; in a `.pt2` before it is packed as a whole."""
    if coded is not None:
        return sum(coded[name] for name in layer.weights)
    if quantized:
        return sum(facts["bytes_after"] for facts in quantized)
    return sum(left[name].nbytes for name in layer.weights)


def _bits_per_weight(payload: Payload, candidate: _Candidate) -> float:
    """Stored bits of all parameters, scales and zero points counted, over their number."""
    final, coded = candidate.plain, candidate.weight_bytes
    stored = {name: final.state_dict[name] for name in trainable(final)}
    tied = aliases(stored)
    state = sum(
        value.nbytes if coded is None else coded[name] for name, value in stored.items() if name not in tied
    )
    if coded is None:
        weights = quantized_layers(payload)[0].values()
        state -= sum(facts["bytes_before"] - facts["bytes_after"] for facts in weights)
    return float(round(8 * state / max(1, parameters(final)), 4))


def _least(values: Iterable[float | None]) -> float | None:
    """The smallest of what is known: a weight without quantization noise has no ratio to it."""
    return min((value for value in values if value is not None), default=None)


def _prove(expected: ExportedProgram, published: Runner, payload: Payload) -> None:
    """Run the published bytes and the program in memory on one batch; they must agree to the last bit."""
    inputs = smoke_inputs(published.program)
    mine, theirs = _outputs(Runner(expected), inputs), _outputs(published, inputs)
    if len(mine) != len(theirs) or not all(_same(a, b) for a, b in zip(mine, theirs, strict=True)):
        raise ArtifactCorrupt(
            f"{payload['model']['name']}: the published program computes something else than the one in memory; "
            "nothing was published"
        )


def _prove_tensors(expected: ExportedProgram, decoded: ExportedProgram, payload: Payload) -> None:
    """Every stored tensor came back to the last bit, and what is tied is tied."""
    mine, theirs = tensors(expected), tensors(decoded)
    same = list(mine) == list(theirs) and aliases(mine) == aliases(theirs)
    wrong = [name for name in mine if not same or not _same_bits(mine[name], theirs[name])]
    if wrong:
        raise ArtifactCorrupt(
            f"{payload['model']['name']}: {wrong[0]} is decoded to something else than what was coded; "
            "nothing was published"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return torch.equal(a, b)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit; NaN is equal to NaN: made-up inputs may well lead there."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def _outputs(runner: Runner, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    own = {name: value.clone() for name, value in inputs.items()}  # some programs write into them
    args, kwargs = bind(runner.program, own)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # the same draws for a program that draws
        result = runner.module(*args, **kwargs)
    leaves, _ = torch.utils._pytree.tree_flatten(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
