"""What the benchmarks of checkpoints share: models, places, specs, the peer's environment, runs of both sides."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_model
from processes import Cost, measure

from fleetpress.storage.s3_client import shared_client
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import is_s3

HERE = Path(__file__).resolve().parent
SCHEME = "W4A16_ASYM"
STAGES = ("read", "compute", "write", "wait")
SPEC = """\
version: 1
name: checkpoints
output: {output}
models:
  - {{name: model, source: "{source}", recipe: w4}}
recipes:
  w4: {{quantize: {{scheme: {scheme}, ignore: [lm_head, model.embed_tokens]}}}}
{resources}"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model on disk, made once."""

    name: str
    folder: Path
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """From where to where; both are folders or s3:// prefixes. The output must be new: records in it are believed."""

    source: str
    output: str
    memory_per_task: str | None = None


def model(folder: Path, *, layers: int = 16, giant: bool = False) -> Model:
    """The model of so many layers in 6 shards, or the one of one shard with tensors of 600 MB."""
    size = make_model.giant() if giant else make_model.Size(layers=layers)
    name = "giant" if giant else f"layers-{layers}"
    place = folder / "models" / name
    if not (place / "config.json").exists():  # written after the shards
        say(f"making {place}")
        make_model.make(place, size)
    return Model(name=name, folder=place, bytes=make_model.size_bytes(make_model.shapes(size)))


def upload(one: Model, bucket: str) -> str:
    """Put a model into a bucket; gives its uri."""
    for path in sorted(one.folder.iterdir()):
        shared_client().upload_file(str(path), bucket.removeprefix("s3://"), f"{one.name}/{path.name}")
    return f"{bucket}/{one.name}"


def remove(uri: str) -> None:
    """Delete everything at a folder or below a prefix."""
    if not is_s3(uri):
        shutil.rmtree(uri)
        return
    store = open_store(uri)
    for item in store.list():
        store.delete(item.key)


def fleetpress(job: Job, folder: Path, *, noop: bool = False, address: str | None = None) -> Cost:
    """One run as its own process: inline, or on the Ray cluster at `address`; with `noop` nothing is computed."""
    spec = folder / "spec.yaml"
    resources = f"resources: {{memory_per_task: {job.memory_per_task}}}\n" if job.memory_per_task else ""
    spec.write_text(SPEC.format(output=job.output, source=job.source, scheme=SCHEME, resources=resources))
    program: list[str | Path] = [Path(sys.executable).with_name("fleetpress")]
    if noop:
        program = [sys.executable, HERE / "noop.py"]
    where = ["--address", address] if address else ["--executor", "inline"]
    os.sync()  # what earlier runs have written must not be written back during this one
    return measure([*program, "run", "--json", *where, spec])


def peer(python: Path, source: str, output: str) -> Cost:
    """The same by the peer, as its own process; between buckets with download and upload."""
    os.sync()
    return measure([python, HERE / "peer.py", source, output, SCHEME])


def peer_python(environment: Path) -> Path:
    """The interpreter of the peer's environment, which is made if there is none."""
    python = environment / "bin" / "python"
    if not python.exists():
        say(f"setting up the peer in {environment}: once, some minutes")
        venv.create(environment, with_pip=True)
        pip: list[str | Path] = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "-r", HERE / "peer_requirements.txt"], check=True)
    return python


def stages(output: str) -> dict[str, dict[str, float]]:
    """Bytes, seconds and CPU seconds of each stage, summed over all records of a run's output; empty if none tells."""
    store = open_store(output)
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for item in store.list("records/"):
        if not item.key.endswith(".json"):  # bytes that one task leaves for another
            continue
        told: Mapping[str, Mapping[str, Any]] = json.loads(store.get(item.key))["result"].get("stages", {})
        for stage, figures in told.items():
            for name, value in figures.items():
                found[stage][name] += value
    return {
        stage: dict(found[stage])
        for stage in (*STAGES, *sorted(found.keys() - set(STAGES)))
        if stage in found
    }


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
