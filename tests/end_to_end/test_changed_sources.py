"""A source that is replaced while it is read: its model fails and says so, nothing mixed is published, others go on."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs import run_fleet
from fleetpress.jobs.artifacts import verify
from fleetpress.jobs.checkpoint import layout, steps, tasks
from fleetpress.jobs.gc import delete_leftovers, find_leftovers
from fleetpress.jobs.planning import plan_builder as planning
from fleetpress.jobs.programs.materials import forget
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage import store as stores
from fleetpress.storage.store import ObjectStore, open_store

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "crashes"))

from crash_fleets import FIRST, KINDS, SECOND, files
from crash_forks import BLOCK_BYTES, CHUNK_BYTES, LAYOUT, ONE_PUT_BYTES
from crash_trials import published
from crashes import SMALLEST_PART_BYTES, answers_gone_uploads

OLD, NEW = files(0), files(1)
NAMES = {"program": "net", "shards": "language"}
# Of each case: the kind, the file that is replaced, and the operation (on which key, at what time) before which it is.
CASES = {
    "program": ("program", "net.pt2", ("get", "net.pt2", 1)),
    "data, before training": ("program", "train-0.npz", ("get", "train-0.npz", 1)),
    "data, its second shard": ("program", "train-1.npz", ("get", "train-1.npz", 1)),
    "data, before it is measured": ("program", "eval.npz", ("get", "eval.npz", 1)),
    "shard, before its tensors": ("shards", FIRST, ("read_into", FIRST, 1)),
    "shard, between ranges of one task": ("shards", FIRST, ("read_into", FIRST, 2)),
    "shard, between tasks": ("shards", FIRST, ("put", ".json", 4)),
    "shard, after its tensors": ("shards", FIRST, ("complete_upload", "", 1)),
    "shard of one task": ("shards", SECOND, ("read_into", SECOND, 2)),
    "file beside the weights": ("shards", "tokenizer.json", ("get", "tokenizer.json", 1)),
}

ON_S3 = (
    "program",
    "data, before it is measured",
    "shard, between ranges of one task",
    "shard, after its tensors",
)


class Watched:
    """A store that does something before one of its operations."""

    def __init__(self, store: ObjectStore, before: Callable[[str, str], None]) -> None:
        self._store, self._before = store, before

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name == "uri":
            return found

        def passed(*args: Any, **options: Any) -> Any:
            self._before(name, str(args[0]) if args else "")
            return found(*args, **options)

        return passed


@pytest.fixture(autouse=True)
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks of several ranges and parts, of some kB."""
    from moto.s3 import models

    forget()  # what an earlier test has read would not be read again
    for name, size in LAYOUT.items():
        monkeypatch.setattr(layout, name, size)
    monkeypatch.setattr(steps, "ONE_PUT_BYTES", ONE_PUT_BYTES)
    monkeypatch.setattr(tasks, "block_bytes", lambda _: BLOCK_BYTES)
    monkeypatch.setattr(planning, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", SMALLEST_PART_BYTES)
    monkeypatch.setattr("fleetpress.jobs.programs.publishing._LATENCY_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def gone_uploads() -> Iterator[None]:
    with answers_gone_uploads():
        yield


def key_of(kind: str, file: str) -> str:
    return f"language/{file}" if kind == "shards" else file


def spec_of(kind: str, place: str, output: str) -> Spec:
    text = KINDS[kind].spec_text(f"{place}/source", f"{place}/{output}", KINDS["checkpoint"])
    return parse_spec(text, "spec.yaml")


def states(result: FleetResult) -> dict[str, str]:
    return {model.name: model.state for model in result.models}


@pytest.fixture(scope="module")
def quiet_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, str]]:
    """By kind and file: what is published of the new file and the other old ones, in whatever place."""

    @functools.cache
    def results(kind: str, file: str) -> dict[str, str]:
        place = str(tmp_path_factory.mktemp("quiet"))
        for key, data in {**OLD, key_of(kind, file): NEW[key_of(kind, file)]}.items():
            open_store(f"{place}/source").put(key, data)
        assert run_fleet(spec_of(kind, place, "output"), executor="inline").exit_code == 0
        return without_manifests(f"{place}/output")

    return results


@pytest.fixture
def place_of(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """An empty place in a folder or on moto."""
    return lambda name: str(tmp_path if name == "folder" else request.getfixturevalue("s3_uri"))


def without_manifests(output: str) -> dict[str, str]:
    """Hashes of what is published; a manifest says where its source lies."""
    return {k: v for k, v in published(open_store(output)).items() if not k.endswith("/manifest.json")}


@pytest.mark.parametrize(
    ("case", "place"),
    [(case, place) for case in CASES for place in ("folder", "s3") if place != "s3" or case in ON_S3],
)
def test_the_model_fails_and_says_so(
    case: str,
    place: str,
    place_of: Callable[[str], str],
    quiet_results: Callable[[str, str], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, file, (operation, key, at) = CASES[case]
    store_uri = place_of(place)
    store = open_store(f"{store_uri}/source")
    for name, data in OLD.items():
        store.put(name, data)
    seen = 0

    def replace(name: str, at_key: str) -> None:
        nonlocal seen
        if name == operation and at_key.endswith(key):
            seen += 1
            if seen == at:
                store.put(key_of(kind, file), NEW[key_of(kind, file)])

    spec = spec_of(kind, store_uri, "output")
    new_store = stores._new_store
    with monkeypatch.context() as patch:
        patch.setattr(stores, "_new_store", lambda place: Watched(new_store(place), replace))
        patch.setattr(stores, "_stores", {})
        result = run_fleet(spec, executor="inline")
    assert seen >= at, "the file was never replaced"
    assert states(result) == {NAMES[kind]: "failed", "lone": "published"}
    assert result.exit_code == 3
    reason = result.models[0].reason or ""
    assert file in reason
    assert "has changed since" in reason
    output = open_store(spec.output)
    made = [name.rpartition("/")[2] for name in output.sizes(f"models/{NAMES[kind]}/")]
    assert not {"manifest.json", "latest.json"} & set(made)

    again = run_fleet(spec, executor="inline")
    assert states(again) == {NAMES[kind]: "published", "lone": "unchanged"}
    delete_leftovers(output, find_leftovers(output))
    assert without_manifests(spec.output) == quiet_results(kind, file)
    assert verify(f"{spec.output}/models/{NAMES[kind]}") == []
