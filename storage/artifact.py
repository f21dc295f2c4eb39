"""Published artifacts: `<output>/models/<name>/<digest>/`, complete as soon as its `manifest.json` is there.

The order makes it so: data files, each read back and compared; then the manifest that lists them; then the pointer
`models/<name>/latest.json`. A crash in between leaves files that nothing names, and the next run writes them again.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from . import canonical_json
from .errors import ArtifactCorrupt, NotWritable, ObjectNotFound
from .near_misses import hint
from .store import ObjectStore, open_store, read_json
from .uri import is_valid_key, join, validate_key

MANIFEST = "manifest.json"
LATEST = "latest.json"
METRICS = "metrics.json"
PROGRAM_FILE = "model.pt2"  # a program whose weights are packed

_MEASURED = ("latency_ms", "latency_packed_ms")  # times within METRICS: every run that writes it has its own
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ArtifactFile:
    """A file of an artifact as its manifest lists it; `path` is relative to the artifact."""

    path: str
    bytes: int
    sha256: str

    def as_dict(self) -> dict[str, str | int]:
        """The manifest's entry."""
        return {"path": self.path, "bytes": self.bytes, "sha256": self.sha256}


def artifact_key(name: str, digest: str, path: str) -> str:
    """The key of one artifact file in the output. Raises InvalidUri."""
    return validate_key(f"models/{name}/{digest}/{path}")


def write_artifact(
    store: ObjectStore, name: str, digest: str, files: Mapping[str, bytes]
) -> list[ArtifactFile]:
    """Writes the data files of an artifact, sorted by path; ArtifactCorrupt if one reads back differently.

    May be called several times for one artifact, so that not all files need to be in memory at once.
    """
    return [
        (_write_metrics if path == METRICS else _write_checked)(
            store, artifact_key(name, digest, path), path, files[path]
        )
        for path in sorted(files)
    ]


def publish_manifest(
    store: ObjectStore,
    name: str,
    digest: str,
    manifest: Mapping[str, object],
    files: Sequence[ArtifactFile],
) -> None:
    """Writes `manifest.json`, which makes the artifact exist: call it last. ArtifactCorrupt as for the files.

    `manifest` has all fields but `files`. Where writes are not conditional another run may put its own `metrics.json`
    in place meanwhile: then that one is listed. Whoever puts one lists it afterwards, so the last manifest is right.
    """
    key, metrics_key = (artifact_key(name, digest, path) for path in (MANIFEST, METRICS))
    listed = {file.path: file for file in files}
    while True:
        entries = [file.as_dict() for file in listed.values()]
        _write_checked(store, key, MANIFEST, canonical_json.dumps_short({**manifest, "files": entries}))
        if METRICS not in listed:
            return
        found = _file(METRICS, store.get(metrics_key))
        if found == listed[METRICS]:
            return
        listed[METRICS] = found


def manifest_exists(store: ObjectStore, name: str, digest: str) -> bool:
    """Whether this artifact was published."""
    return exists(store, artifact_key(name, digest, MANIFEST))


def point_latest(store: ObjectStore, name: str, digest: str, run: str) -> None:
    """Makes `models/<name>` stand for this artifact."""
    store.put(f"models/{validate_key(name)}/{LATEST}", canonical_json.dumps({"digest": digest, "run": run}))


def resolve(uri: str) -> str:
    """The uri of the artifact that `uri` names: itself, or the one its `latest.json` points to.

    Raises ObjectNotFound if there is neither a manifest nor a pointer.
    """
    store = open_store(uri)
    if exists(store, MANIFEST):
        return store.uri
    try:
        pointer = _json_object(store, LATEST)
    except ObjectNotFound as error:
        what = f"{uri} is no artifact: it holds neither {MANIFEST} nor {LATEST}"
        raise ObjectNotFound(f"{what}; give <output>/models/<name>[/<digest>]{hint(uri)}") from error
    digest = pointer.get("digest")
    if not isinstance(digest, str) or "/" in digest or not is_valid_key(digest):
        raise ArtifactCorrupt(f"{join(uri, LATEST)} has no valid digest: publish the model again")
    return join(uri, digest)


def read_manifest(uri: str) -> dict[str, object]:
    """The manifest of the artifact that `uri` names. Raises ObjectNotFound, ArtifactCorrupt."""
    return _json_object(open_store(resolve(uri)), MANIFEST)


def verify_files(uri: str) -> list[str]:
    """Compares every file with the manifest; one line per problem, none if all is well.

    Raises ObjectNotFound, ArtifactCorrupt if there is no readable manifest to compare with.
    """
    store = open_store(resolve(uri))
    manifest = _json_object(store, MANIFEST)
    listed = _listed_files(store, manifest)
    present = {info.key: info.size_bytes for info in store.list() if info.key != MANIFEST}
    problems = []
    for path, file in listed.items():
        if path not in present:
            problems.append(f"{path}: missing")
        elif present[path] != file.bytes:
            problems.append(f"{path}: {present[path]} bytes, {file.bytes} in the manifest")
        elif _sha256_in(store, path, file.bytes) != file.sha256:
            problems.append(f"{path}: its sha256 is not the manifest's")
    problems.extend(f"{path}: not in the manifest" for path in present if path not in listed)
    return problems


def without_times(path: str, data: bytes) -> object:
    """The content of a file without what every run measures for itself: times, and the hash of the file with them.

    ValueError if a manifest or metrics are no such file.
    """
    if path not in (METRICS, MANIFEST):
        return data
    fields = canonical_json.loads(data)
    try:
        if path == METRICS:
            for side in ("before", "after"):
                for name in _MEASURED:
                    fields.get(side, {}).pop(name, None)
        elif "files" in fields:
            fields["files"] = [file for file in fields["files"] if file["path"] != METRICS]
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"is no {path}") from error
    return fields


def _write_metrics(store: ObjectStore, key: str, path: str, data: bytes) -> ArtifactFile:
    """Of two runs at once the first one's stay: each has measured times of its own."""
    with suppress(NotWritable):  # conditionally, that is; `publish_manifest` lists whichever is last
        store.put_if_absent(key, data)
    stored = _get_if_there(store, key)
    if not _equal(path, stored, data):  # damaged, or an earlier version wrote it
        store.put(key, data)
        stored = store.get(key)
    _require(_equal(path, stored, data), store, key)
    return _file(path, stored)


def _write_checked(store: ObjectStore, key: str, path: str, data: bytes) -> ArtifactFile:
    file = _file(path, data)
    store.put(key, data)
    if path == MANIFEST:
        _require(_equal(path, store.get(key), data), store, key)
    else:
        _require(_sha256_in(store, key, file.bytes) == file.sha256, store, key)
    return file


def _file(path: str, data: bytes) -> ArtifactFile:
    return ArtifactFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _get_if_there(store: ObjectStore, key: str) -> bytes:
    try:
        return store.get(key)
    except ObjectNotFound:
        return b""


def _equal(path: str, stored: bytes, data: bytes) -> bool:
    if stored == data:
        return True
    try:
        return without_times(path, stored) == without_times(path, data)
    except ValueError:
        return False


def _require(is_stored: bool, store: ObjectStore, key: str) -> None:
    if not is_stored:
        raise ArtifactCorrupt(
            f"{join(store.uri, key)} reads back differently from what was written: check the store"
        )


def _sha256_in(store: ObjectStore, key: str, size_bytes: int) -> str:
    """The hash of what the store holds; "" if it holds another number of bytes."""
    if size_bytes <= _PIECE_BYTES:
        data = store.get(key)
        return hashlib.sha256(data).hexdigest() if len(data) == size_bytes else ""
    if store.head(key).size_bytes != size_bytes:
        return ""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for start in range(0, size_bytes, _PIECE_BYTES):
        piece = buffer[: size_bytes - start]
        store.read_into(key, start, piece)  # equal bytes may replace it meanwhile; others give another hash
        digest.update(piece)
    return digest.hexdigest()


def exists(store: ObjectStore, key: str) -> bool:
    """Whether there is such an object."""
    try:
        store.head(key)
    except ObjectNotFound:
        return False
    return True


def _json_object(store: ObjectStore, key: str) -> dict[str, object]:
    try:
        value = read_json(store, key)
    except ValueError as error:
        raise ArtifactCorrupt(f"{join(store.uri, key)} is not JSON: publish the model again") from error
    if not isinstance(value, dict):
        raise ArtifactCorrupt(f"{join(store.uri, key)} is no JSON object: publish the model again")
    return value


def _listed_files(store: ObjectStore, manifest: Mapping[str, object]) -> dict[str, ArtifactFile]:
    entries = manifest.get("files")
    listed: dict[str, ArtifactFile] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case {"path": str(path), "bytes": int(size_bytes), "sha256": str(sha256)} if is_valid_key(path):
                listed[path] = ArtifactFile(path=path, bytes=size_bytes, sha256=sha256)
            case _:
                raise ArtifactCorrupt(
                    f"{join(store.uri, MANIFEST)} has no valid list of files: publish the model again"
                )
    return listed
