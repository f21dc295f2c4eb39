"""A fleet whose steps do nothing but leave what real ones would: records, files beside them, a published artifact.

Resolving, planning, scheduling, leases, ledger, summaries and pages are the product's own.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from memory_store import Bucket, MemoryStore

import fleetpress.jobs.driver.run
import fleetpress.jobs.executors.inline
import fleetpress.storage.store
from fleetpress.jobs.handover import Payload, record, store_bytes
from fleetpress.jobs.manifest import companions, complete
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.jobs.tasks import Failure, StepResult, Task, TaskRecord
from fleetpress.storage.artifact import write_artifact
from fleetpress.storage.store import open_store

OUTPUT = "s3://memory/output"
LAYERS = 8  # of every model, in its metrics.json

_SPEC = """\
version: 1
name: scale
output: {output}
models:
{models}
data:
  digits: {{train: "s3://memory/data/train-*.npz", eval: "s3://memory/data/test.npz", loss: cross_entropy}}
recipes:
  small:
    collect: {{batch_size: 64}}
    prune: {{method: gradient_stability, sparsity: 0.5}}
    finetune: {{epochs: 1, batch_size: 64}}
    quantize: {{scheme: W4A16}}
"""
_SUFFIXES = {
    "collect": ".safetensors",
    "prune": ".pt2",
    "finetune": ".safetensors",
    "quantize": ".safetensors",
}
_FILE = b"x" * 1024  # what a step leaves beside its record


@contextmanager
def in_memory() -> Iterator[Bucket]:
    """Every place of the process is in one bucket, and steps do nothing."""
    bucket = Bucket()
    inline = fleetpress.jobs.executors.inline
    execute = inline.execute

    def as_worker(*args: Any, **options: Any) -> TaskRecord | Failure:
        bucket.who = "worker"
        try:
            return execute(*args, **options)
        finally:
            bucket.who = "driver"

    with ExitStack() as stack:
        for place, name, value in (
            (fleetpress.storage.store, "_new_store", lambda place: MemoryStore(place, bucket)),
            (fleetpress.storage.store, "_stores", {}),
            (fleetpress.jobs.driver.run, "run_step", nothing),
            (inline, "execute", as_worker),
        ):
            stack.enter_context(patch.object(place, name, value))
        yield bucket


def make_fleet(bucket: Bucket, count: int, *, explicit: bool) -> Spec:
    """Write the sources of so many models; their spec names each of them, or all by a pattern."""
    for name in ("train-0.npz", "train-1.npz", "test.npz"):
        bucket.write(f"memory/data/{name}", name.encode())
    names = [f"customer-model-{index:07}" for index in range(count)]
    for name in names:
        key = f"{name}/model.pt2" if explicit else f"{name}.pt2"
        bucket.write(f"memory/models/{key}", name.encode())
    entry = '  - {{source: "s3://memory/models/{}", data: digits, recipe: small}}'
    sources = [f"{name}/model.pt2" for name in names] if explicit else ["*.pt2"]
    return parse_spec(_SPEC.format(output=OUTPUT, models="\n".join(map(entry.format, sources))), "scale.yaml")


def nothing(task: Task) -> StepResult:
    """In place of `run_step`."""
    payload = task.payload
    if task.kind == "publish":
        return _published(payload)
    stages = payload["stages"].values()
    for digests in stages:
        for digest in [digests] if isinstance(digests, str) else digests:
            record(payload, digest)  # a real step reads the records of those before it, too
    suffix = _SUFFIXES[task.kind]
    return StepResult(result={"bytes": len(_FILE)}, outputs=(store_bytes(payload, _FILE, suffix),))


def _published(payload: Payload) -> StepResult:
    size = payload["model"]["files"][0]["bytes"]
    shared = {"metric": "accuracy", "value": 0.99, "parameters": 61_706, "macs": 416_520, "latency_ms": 0.5}
    metrics = {
        "before": {**shared, "bytes": 1000 * size, "stage": "source"},
        "after": {**shared, "bytes": len(_FILE), "latency_packed_ms": 0.6},
        "compression_ratio": 12.2,
        "bits_per_weight": 4.3,
        "layers": [
            {
                "name": f"layers.{index}",
                "kind": "Linear",
                "sparsity": 0.5,
                "removed_units": list(range(16)),
                "num_bits": 4,
                "group_size": 128,
                "bytes_before": 65_536,
                "bytes_after": 4_352,
                "sqnr_db": 20.0,
                "skipped": None,
            }
            for index in range(LAYERS)
        ],
    }
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    data = hashlib.sha256(name.encode()).digest() * 32
    files = write_artifact(store, name, digest, {"model.pt2": data, **companions(payload, metrics)})
    return complete(payload, metrics, kind="program", form="pt2", files=files)
