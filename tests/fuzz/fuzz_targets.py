"""Everything that is parsed, as plain functions of bytes: the same table feeds the kept corpus, hypothesis and atheris.

A target gives the bytes to the product's own entry point. It returns if they were accepted and raises what the
package documents if they were refused; `verdict` calls anything else a failure.
"""

import os
import posixpath
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fleetpress.jobs.artifacts import published
from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.ledger import Ledger
from fleetpress.jobs.report import page_of
from fleetpress.jobs.runs.results import read_result
from fleetpress.jobs.schedule.file import load_schedules
from fleetpress.jobs.schedule.records import Claim, Control, FirstSeen, LocalJob, OpenJob, read_record
from fleetpress.jobs.spec.fleet_spec import load_spec
from fleetpress.storage.artifact import read_manifest, resolve, verify_files
from fleetpress.storage.checkpoint import open_checkpoint, read_tensor
from fleetpress.storage.data import find_shards, read_shard
from fleetpress.storage.errors import ArtifactCorrupt, StorageError
from fleetpress.storage.globs import has_glob, matches, split_pattern
from fleetpress.storage.safetensors_header import read_header
from fleetpress.storage.sources import find_models
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import basename, is_s3, join, normalize, split, validate_key

Target = Callable[[bytes], None]

LONGEST_MESSAGE = 5_000
DIGEST = "0" * 64
CONFIG = b'{"model_type": "llama"}'
SHARD = (
    b'@\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}          ' + b"\0\0\x80?\0\0\0@"
)
INDEX = b'{"metadata": {}, "weight_map": {"w": "a.safetensors"}}'
MANIFEST = b'{"files":[],"source":{},"format":"hf","kind":"checkpoint","name":"m","schema_version":1}'
METRICS = b'{"after":{},"before":{},"bits_per_weight":4.5,"compression_ratio":3.5,"layers":[]}'
POINTER = b'{"digest":"' + DIGEST.encode() + b'","run":"r"}'

_folder = tempfile.TemporaryDirectory(
    prefix="fleetpress-fuzz-"
)  # one for the process: names are written over
ROOT = Path(_folder.name)


@dataclass(frozen=True)
class Verdict:
    """What became of a case: `refused` with its message, accepted, or `failure` says which promise was broken."""

    message: str = ""
    refused: bool = False
    failure: str = ""


def verdict(target: str, data: bytes) -> Verdict:
    """Give `data` to a target and judge what it does."""
    try:
        TARGETS[target](data)
    except (StorageError, SpecError) as error:
        message = str(error)
        return Verdict(message=message, refused=True, failure=_unclear(message, isinstance(error, SpecError)))
    except Exception as error:  # noqa: BLE001 whatever it is, it should not have come here
        return Verdict(failure=f"{type(error).__name__} escaped: {str(error)[:300]}")
    return Verdict()


def _unclear(message: str, one_line_per_problem: bool) -> str:
    lines = message.split("\n") if one_line_per_problem else [message]
    if not all(line.strip() for line in lines):
        return "an empty message"
    if "\r" in message or any("\n" in line for line in lines):
        return f"a message of several lines: {message[:200]!r}"
    if any(len(line) > LONGEST_MESSAGE for line in lines):
        return f"a message of {len(message)} characters: {message[:100]!r}..."
    return ""


def _write(key: str, data: bytes) -> str:
    """Writes file `key` of the folder; the folder it lies in."""
    path = ROOT / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path.parent)


def spec(data: bytes) -> None:
    load_spec(posixpath.join(_write("spec/spec.yaml", data), "spec.yaml"))


def safetensors_header(data: bytes) -> None:
    read_header(open_store(_write("header/model.safetensors", data)), "model.safetensors")


def safetensors_index(data: bytes) -> None:
    _write("index/config.json", CONFIG)
    _write("index/a.safetensors", SHARD)
    _all_tensors(_write("index/model.safetensors.index.json", data))


def checkpoint_shard(data: bytes) -> None:
    _write("shard/config.json", CONFIG)
    _write("shard/model.safetensors.index.json", INDEX)
    _all_tensors(_write("shard/a.safetensors", data))


def checkpoint_config(data: bytes) -> None:
    _write("config/model.safetensors", SHARD)
    checkpoint = open_checkpoint(_write("config/config.json", data))
    str(checkpoint.quantized_by)


def _all_tensors(folder: str) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        read_tensor(checkpoint, name)


def program(data: bytes) -> None:
    """Whole, and by ranges without weights, as the planner reads it."""
    from fleetpress.storage.programs import load_program, weights_skeleton

    weights_skeleton(open_store(_write("program/model.pt2", data)), "model.pt2")
    load_program(data)


def coded_model(data: bytes) -> None:
    from fleetpress.jobs.programs.coded_programs import decoded_program

    decoded_program(data)


def state_dict(data: bytes) -> None:
    from fleetpress.storage.state_dicts import load_state_dict

    load_state_dict(data)


def npz(data: bytes) -> None:
    _shard("data.npz", data)


def parquet(data: bytes) -> None:
    _shard("data.parquet", data)


def safetensors_data(data: bytes) -> None:
    _shard("data.safetensors", data)


def _shard(name: str, data: bytes) -> None:
    folder = _write(f"data/{name}", data)
    (file,) = find_shards(f"{folder}/{name}")
    read_shard(open_store(folder), file)


def manifest(data: bytes) -> None:
    _artifact(manifest=data)


def metrics(data: bytes) -> None:
    _artifact(metrics=data)


def pointer(data: bytes) -> None:
    _artifact(pointer=data)


def _artifact(*, manifest: bytes = MANIFEST, metrics: bytes = METRICS, pointer: bytes = POINTER) -> None:
    """One published artifact, read as `list`, `verify` and `load_artifact` do."""
    _write(f"output/models/m/{DIGEST}/manifest.json", manifest)
    _write(f"output/models/m/{DIGEST}/metrics.json", metrics)
    model = _write("output/models/m/latest.json", pointer)
    resolve(model)
    read_manifest(model)
    verify_files(model)
    published(str(ROOT / "output"))


def summary(data: bytes) -> None:
    """A run's summary, and the page that is made of it."""
    _write("runs/runs/r/summary.json", data)
    store = open_store(str(ROOT / "runs"))
    result = read_result(store, "r")
    page_of(store, result)
    result.as_dict()


def record(data: bytes) -> None:
    """A record that proves nothing is as good as none."""
    _write(f"ledger/records/{DIGEST}.json", data)
    if Ledger(open_store(str(ROOT / "ledger"))).find(DIGEST) is None:
        raise ArtifactCorrupt("no valid record")


def schedules(data: bytes) -> None:
    load_schedules(posixpath.join(_write("schedules/schedules.yaml", data), "schedules.yaml"))


def schedule_record(data: bytes) -> None:
    for kind in (Claim, OpenJob, Control, LocalJob, FirstSeen):
        read_record(open_store(_write("schedule_record/record.json", data)), "record.json", kind)


def uri(data: bytes) -> None:
    """A uri, a key and a pattern at once; folders outside of the temporary one are not looked into."""
    text = data.decode("utf-8", "surrogateescape")
    place = normalize(text)
    if "\\" not in text:
        split(text)
    basename(text)
    fixed, pattern = split_pattern(text)
    assert normalize(fixed) == fixed
    assert normalize(place) == place
    matches(pattern, pattern)
    if is_s3(text):
        return
    inside = join(str(ROOT / "uri"), validate_key(text.lstrip("/")))
    assert inside.startswith(f"{ROOT}/uri/"), inside
    if not has_glob(text):
        (ROOT / "uri").mkdir(exist_ok=True)
        find_models(inside)


def key(data: bytes) -> None:
    """A key that is accepted stays below its root, whatever the file system makes of it."""
    text = validate_key(data.decode("utf-8", "surrogateescape"))
    assert os.path.normpath(os.path.join("/root", text)) == f"/root/{text}"
    store = open_store(str(ROOT / "keys"))
    store.head(text)


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        spec,
        safetensors_header,
        safetensors_index,
        checkpoint_shard,
        checkpoint_config,
        program,
        coded_model,
        state_dict,
        npz,
        parquet,
        safetensors_data,
        manifest,
        metrics,
        pointer,
        summary,
        record,
        schedules,
        schedule_record,
        uri,
        key,
    )
}
