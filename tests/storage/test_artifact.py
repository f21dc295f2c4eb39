"""Artifacts: read back before they are promised, promised last, checked again later."""

import hashlib
import json

import pytest

from fleetpress.storage import artifact
from fleetpress.storage.artifact import (
    ArtifactFile,
    manifest_exists,
    point_latest,
    publish_manifest,
    read_manifest,
    resolve,
    verify_files,
    write_artifact,
)
from fleetpress.storage.errors import ArtifactCorrupt, InvalidUri, NotWritable, ObjectNotFound
from fleetpress.storage.store import ObjectInfo, ObjectStore, open_store
from fleetpress.storage.uri import join

_FILES = {"model.pt2": b"weights" * 1000, "metrics.json": b"{}", "sub/tokenizer.json": b"[]"}


@pytest.fixture
def published(store: ObjectStore) -> str:
    """The uri of a whole artifact."""
    files = write_artifact(store, "lenet5", "d1", _FILES)
    publish_manifest(store, "lenet5", "d1", {"schema_version": 1, "name": "lenet5"}, files)
    point_latest(store, "lenet5", "d1", "run-1")
    return join(store.uri, "models/lenet5/d1")


class Damaging:
    """A store that keeps something else than it was given."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def put(self, key: str, data: bytes) -> ObjectInfo:
        return self._inner.put(key, data[:-1] + bytes([data[-1] ^ 1]))


def test_layout(store: ObjectStore, published: str) -> None:
    assert {info.key for info in store.list()} == {
        "models/lenet5/latest.json",
        "models/lenet5/d1/manifest.json",
        *(f"models/lenet5/d1/{path}" for path in _FILES),
    }
    assert json.loads(store.get("models/lenet5/latest.json")) == {"digest": "d1", "run": "run-1"}
    assert open_store(published).get("manifest.json").startswith(b'{"files":[\n{"bytes":')


def test_files_are_described(store: ObjectStore) -> None:
    files = write_artifact(store, "lenet5", "d1", _FILES)
    assert files == [
        ArtifactFile(path=path, bytes=len(_FILES[path]), sha256=hashlib.sha256(_FILES[path]).hexdigest())
        for path in sorted(_FILES)
    ]


def test_exists_only_with_its_manifest(store: ObjectStore) -> None:
    assert not manifest_exists(store, "lenet5", "d1")
    write_artifact(store, "lenet5", "d1", _FILES)
    assert not manifest_exists(store, "lenet5", "d1")
    publish_manifest(store, "lenet5", "d1", {}, [])
    assert manifest_exists(store, "lenet5", "d1")
    assert not manifest_exists(store, "lenet5", "d2")


@pytest.mark.parametrize("piece_bytes", [16 << 20, 1000])
def test_damage_on_the_way_is_seen(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(artifact, "_PIECE_BYTES", piece_bytes)
    damaging = Damaging(store)
    with pytest.raises(ArtifactCorrupt, match=r"lenet5/d1/model\.pt2"):
        write_artifact(damaging, "lenet5", "d1", {"model.pt2": b"weights" * 1000})
    with pytest.raises(ArtifactCorrupt, match=r"lenet5/d1/manifest\.json"):
        publish_manifest(damaging, "lenet5", "d1", {}, [])


def metrics(milliseconds: float, ratio: float = 4.0) -> bytes:
    return json.dumps({"after": {"latency_ms": milliseconds}, "compression_ratio": ratio}).encode()


def test_metrics_of_the_first_of_two_runs_stay(store: ObjectStore) -> None:
    """Each has measured times of its own."""
    (first,) = write_artifact(store, "net", "d1", {"metrics.json": metrics(1.5)})
    (second,) = write_artifact(store, "net", "d1", {"metrics.json": metrics(1.25)})
    assert first == second
    assert store.get("models/net/d1/metrics.json") == metrics(1.5)


def test_metrics_where_no_write_is_conditional(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key: str, data: bytes) -> bool:
        raise NotWritable(key)

    monkeypatch.setattr(store, "put_if_absent", refuse)
    (first,) = write_artifact(store, "net", "d1", {"metrics.json": metrics(1.5)})
    assert write_artifact(store, "net", "d1", {"metrics.json": metrics(1.25)}) == [first]


@pytest.mark.parametrize("there", [b"{", b"[]", metrics(1.5, ratio=3.0)])
def test_other_metrics_are_replaced(store: ObjectStore, there: bytes) -> None:
    """Damaged, or written by an earlier version."""
    store.put("models/net/d1/metrics.json", there)
    files = write_artifact(store, "net", "d1", {"metrics.json": metrics(1.5)})
    publish_manifest(store, "net", "d1", {}, files)
    assert store.get("models/net/d1/metrics.json") == metrics(1.5)
    assert verify_files(join(store.uri, "models/net/d1")) == []


def test_metrics_that_are_replaced_meanwhile_are_listed(store: ObjectStore) -> None:
    """Of two runs at once on a server that ignores conditions."""
    first = write_artifact(store, "net", "d1", {"metrics.json": metrics(1.5)})
    store.put("models/net/d1/metrics.json", metrics(1.25))
    second = write_artifact(store, "net", "d1", {"metrics.json": metrics(1.25)})
    assert first != second
    uri = join(store.uri, "models/net/d1")
    publish_manifest(store, "net", "d1", {}, second)
    assert verify_files(uri) == []
    publish_manifest(store, "net", "d1", {}, first)
    assert verify_files(uri) == []


@pytest.mark.parametrize("name", ["", "../x", "a//b", "/etc"])
def test_names_are_checked(store: ObjectStore, name: str) -> None:
    with pytest.raises(InvalidUri):
        write_artifact(store, name, "d1", _FILES)
    with pytest.raises(InvalidUri):
        point_latest(store, name, "d1", "run")
    with pytest.raises(InvalidUri):
        write_artifact(store, "ok", "d1", {f"{name}/../x": b""})


def test_resolve(store: ObjectStore, published: str) -> None:
    folder = join(store.uri, "models/lenet5")
    assert resolve(published) == resolve(folder) == resolve(folder + "/") == published
    write_artifact(store, "lenet5", "d2", {})
    publish_manifest(store, "lenet5", "d2", {"name": "second"}, [])
    point_latest(store, "lenet5", "d2", "run-2")
    assert resolve(folder) == join(folder, "d2")
    assert read_manifest(folder)["name"] == "second"
    assert read_manifest(published)["name"] == "lenet5"


def test_no_artifact(store: ObjectStore) -> None:
    for action in (resolve, read_manifest, verify_files):
        with pytest.raises(ObjectNotFound, match=r"neither manifest\.json nor latest\.json"):
            action(join(store.uri, "models/none"))


@pytest.mark.parametrize(
    "pointer", [b"", b"[]", b"{}", b'{"digest": 1}', b'{"digest": "../../b"}', b'{"digest": ".."}', b"\xff"]
)
def test_bad_pointer(store: ObjectStore, pointer: bytes) -> None:
    store.put("models/a/latest.json", pointer)
    with pytest.raises(ArtifactCorrupt, match=r"models/a/latest\.json"):
        resolve(join(store.uri, "models/a"))


@pytest.mark.parametrize("piece_bytes", [16 << 20, 1000])
def test_verify(published: str, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(artifact, "_PIECE_BYTES", piece_bytes)
    folder = open_store(published)
    assert verify_files(published) == []
    folder.put("model.pt2", b"Weights" * 1000)
    assert verify_files(published) == ["model.pt2: its sha256 is not the manifest's"]
    folder.put("model.pt2", b"weights" * 999)
    assert verify_files(published) == ["model.pt2: 6993 bytes, 7000 in the manifest"]
    folder.delete("model.pt2")
    folder.put("extra.bin", b"")
    assert verify_files(published) == ["model.pt2: missing", "extra.bin: not in the manifest"]


@pytest.mark.parametrize(
    "manifest",
    [
        b"not json",
        b"[" * 100_000,
        b"{}",
        b'{"files": [{"path": "x"}]}',
        b'{"files": [{"path": "x", "bytes": "1", "sha256": "y"}]}',
        b'{"files": [{"path": "../../secret", "bytes": 1, "sha256": "y"}]}',
    ],
)
def test_bad_manifest(published: str, manifest: bytes) -> None:
    open_store(published).put("manifest.json", manifest)
    with pytest.raises(ArtifactCorrupt, match=r"d1/manifest\.json"):
        verify_files(published)
