"""Made-up runs of any size, the same ones every time: models of all states, events of several workers, layers."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fleetpress.jobs.report import Material
from fleetpress.jobs.runs.results import FleetResult, ModelResult

RUN = "20260301T020000123Z-1a2b3c"
RUN_BEFORE = "20260228T020000123Z-0f0e0d"
VERSIONS = {"python": "3.11.7", "fleetpress": "0.3.0", "torch": "2.13.0", "ray": "2.60.0"}
SPEC_TEXT = "version: 1\nname: nightly   # every night\noutput: s3://compressed/nightly\n"
_METRICS = (("accuracy", 0.94, 0.01), ("perplexity", 24.0, 0.5), ("cosine", 0.99, 0.005))
_STEPS = ("collect", "prune", "finetune", "quantize", "publish")


def model(index: int, chance: random.Random) -> ModelResult:
    """One of a fleet: most are published, some unchanged, a few rejected or failed."""
    name = f"customer-{index % 17:02}-segmentation-{index:05}"
    lot = chance.random()
    if lot < 0.02:
        reason = f"s3://models/{name}/model.pt2: AccessDenied; let the worker's role read the bucket"
        return ModelResult(name=name, state="failed", reason=reason)
    metric, value, accepted = _METRICS[0 if chance.random() < 0.7 else index % 3]
    before = value * chance.uniform(0.95, 1.05)
    share = abs(chance.gauss(0.3, 0.25)) if lot > 0.05 else chance.uniform(1.05, 3.5)
    drop = accepted * share * (-1 if chance.random() < 0.1 and lot > 0.05 else 1)
    after = before + drop if metric == "perplexity" else before - drop
    size = int(10 ** chance.uniform(5, 9))
    ratio = chance.uniform(3.5, 16)
    rejected = lot <= 0.05
    return ModelResult(
        name=name,
        state="rejected" if rejected else "unchanged" if lot < 0.3 else "published",
        reason=f"{metric} went from {before:.4f} to {after:.4f}, more than max_drop {accepted} allows; "
        "prune less, use more bits, or train longer"
        if rejected
        else None,
        digest=None if rejected else f"{chance.getrandbits(128):032x}",
        before={
            "metric": metric,
            "value": before,
            "bytes": size,
            "parameters": size // 4,
            "macs": size,
            "latency_ms": 0.5123,
            "stage": "source",
        },
        after={
            "metric": metric,
            "value": after,
            "bytes": int(size / ratio),
            "parameters": size // 8,
            "macs": size // 2,
            "latency_ms": 0.3071,
            "latency_packed_ms": 0.4012,
        },
        compression_ratio=round(ratio, 4),
        bits_per_weight=chance.choice((4.125, 4.6797, 8.004)),
        max_drop=accepted,
    )


def fleet(size: int, seed: int = 7) -> FleetResult:
    """A run of that many models."""
    chance = random.Random(seed)
    return FleetResult(
        run=RUN,
        state="done",
        name="nightly",
        output="s3://compressed/nightly",
        models=tuple(model(index, chance) for index in range(size)),
        seconds=14.0 + size * 0.9,
        versions=VERSIONS,
    )


def fleet_before(now: FleetResult) -> FleetResult:
    """The run before it: some models are new since, some were changed, one was removed, one has regressed."""
    earlier = []
    for index, its in enumerate(now.models):
        if index % 29 == 5:
            continue
        if index % 31 == 7 and its.digest:
            its = replace(its, digest="0" * 32, after={**(its.after or {}), "bytes": 12_345})  # noqa: PLW2901
        if its.state == "rejected" and index % 2:
            its = replace(its, state="published", digest="1" * 32, reason=None)  # noqa: PLW2901
        earlier.append(its)
    earlier.append(ModelResult(name="retired-old-model", state="published", digest="2" * 32))
    return replace(now, run=RUN_BEFORE, models=tuple(earlier))


def events(result: FleetResult, workers: int = 6, *, told: bool = True) -> list[bytes]:
    """What its workers did; `told`: on which node, and the bytes."""
    chance = random.Random(11)
    free = [0.5 + 0.2 * worker for worker in range(workers)]
    found: list[dict[str, Any]] = []
    for its in result.models:
        if its.state == "unchanged":
            continue
        worker = min(range(workers), key=lambda index: free[index])
        where = {"where": f"10.0.0.{worker // 2 + 1}"} if told else {}
        for step in _STEPS if its.state != "failed" else _STEPS[:1]:
            start = free[worker]
            seconds = chance.uniform(0.4, 1.2) * (4 if step == "finetune" else 1)
            task = {"model": its.name, "task": f"{its.name}/{step}", **where}
            found.append({"at_seconds": start, "kind": "started", **task})
            if its.state == "failed" or chance.random() < 0.02:
                kind = "give_up" if its.state == "failed" else "retry"
                found.append(
                    {"at_seconds": start + seconds / 2, "kind": kind, "text": "the worker is gone", **task}
                )
                free[worker] = start = start + seconds / 2
                if kind == "give_up":
                    break
                found.append({"at_seconds": start, "kind": "started", **task})
            size = {"bytes_read": 400_000, "bytes_written": 90_000} if told else {}
            end = start + seconds
            found.append({"at_seconds": end, "kind": "finished", "seconds": seconds, **task, **size})
            free[worker] = end + 0.05
    scale = (result.seconds - 0.5) / max(free)
    for event in found:
        for key in ("at_seconds", "seconds"):
            if key in event:
                event[key] = round(event[key] * scale, 3)
    return [
        json.dumps(event, sort_keys=True).encode()
        for event in sorted(found, key=lambda one: one["at_seconds"])
    ]


def layers(count: int) -> dict[str, Any]:
    """What metrics.json tells of a model of so many layers."""
    return {
        "layers": [
            {
                "name": f"encoder.layers.{index}.attention.out_proj"
                if index % 3
                else f"encoder.layers.{index}.mlp",
                "kind": "Linear",
                "sparsity": 0.25 * (index % 3),
                "removed_units": list(range(16 * (index % 3))),
                "num_bits": None if index % 7 == 6 else 4 if index % 2 else 8,
                "group_size": 128,
                "bytes_before": 65_536 * (1 + index % 5),
                "bytes_after": 8_704 * (1 + index % 5),
                "sqnr_db": None if index % 7 == 6 else 19.77 + index % 4 * 4,
                "skipped": "quantize: not among the targets" if index % 7 == 6 else None,
            }
            for index in range(count)
        ],
        "warnings": [],
    }


def material(result: FleetResult, *, layered: int = 50, layer_count: int = 24) -> Material:
    """Everything that a page of the run is made of."""
    names = [its.name for its in result.models if its.digest][:layered]
    return Material(
        layers={name: layers(layer_count) for name in names},
        previous=fleet_before(result),
        events=events(result),
        spec_text=SPEC_TEXT,
    )


def names_by(result: FleetResult, states: Sequence[str]) -> list[str]:
    """Models in these states."""
    return [its.name for its in result.models if its.state in states]
