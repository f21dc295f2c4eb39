"""The steps of a bare checkpoint: open uploads, convert runs of tensors, finish shards, assemble the artifact.

Every task reads its ranges of the source and writes its parts of a shard's multipart upload itself; no task holds a
tensor, and nothing but small records passes through the driver. A shard that one task makes needs no other.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fleetpress.compression.selection import Layer
from fleetpress.compression.treatment import KEPT
from fleetpress.storage import canonical_json
from fleetpress.storage.artifact import ArtifactFile, artifact_key, exists, write_artifact
from fleetpress.storage.buffers import SHARED
from fleetpress.storage.checkpoint import Checkpoint, open_checkpoint
from fleetpress.storage.errors import ArtifactCorrupt, SourceChanged, StorageError, UploadGone
from fleetpress.storage.etags import Part, parse_parts
from fleetpress.storage.safetensors_header import TensorInfo, read_header
from fleetpress.storage.safetensors_layout import framed
from fleetpress.storage.sources import CONFIG, INDEX
from fleetpress.storage.store import ObjectStore, open_store
from fleetpress.storage.streams import ONE_PUT_BYTES, PartWriter, Stages, read_ahead

from .checkpoint_choice import Choice, check_plain, choose, config_of
from .checkpoint_layout import Item, stored_bytes
from .checkpoint_stream import Block, Sums, ahead_bytes, stream
from .checkpoint_tasks import pieces_of
from .handover import Payload, beside, read_file, record
from .manifest import companions, complete
from .tasks import Output, StepResult
from .threads import use_one_thread

CRUMBS = ".crumbs"
_Headers = Mapping[str, Mapping[str, TensorInfo]]  # of the shards, by file


def open_uploads(payload: Payload) -> StepResult:
    """Begin the multipart upload of every shard that several tasks make; they find its id in this record."""
    store, place = open_store(payload["output"]), _place(payload)
    uploads = {path: store.create_upload(artifact_key(*place, path)) for path in payload["shards"]}
    return StepResult(
        result={"uploads": uploads},
        outputs=tuple(
            Output(key=artifact_key(*place, path), bytes=size, sha256="", upload=uploads[path])
            for path, size in payload["shards"].items()
        ),
    )


def convert(payload: Payload) -> StepResult:
    """Treat the tensors of one task and write them into their shard; alone in it, complete the shard as well."""
    store, stages = open_store(payload["output"]), Stages()
    key = artifact_key(*_place(payload), payload["shard"])
    if payload["alone"]:
        file, sums = _whole_shard(payload, store, key, stages)
        return StepResult(
            result={"file": file.as_dict(), "sums": sums, "stages": stages.as_dict()},
            outputs=(Output(key=key, bytes=file.bytes, sha256=file.sha256),),
        )
    upload = _result(payload, payload["opened"])["uploads"][payload["shard"]]
    shard = _Shard(store=store, key=key, upload=upload, payload=payload, stages=stages)
    with shard.writer() as writer:
        sink = _Crumbling(writer.write)
        if payload["header"]:
            writer.write(memoryview(framed(payload["header"])))
        sums = _stream(payload, sink, stages)
        etags = writer.finish()
    outputs = [Output(key=key, bytes=payload["shard_bytes"], sha256="", upload=upload)]
    crumbs = sink.joined()
    if crumbs:
        beside_key = beside(payload["digest"], CRUMBS)
        store.put(beside_key, crumbs)
        outputs.append(Output(key=beside_key, bytes=len(crumbs), sha256=hashlib.sha256(crumbs).hexdigest()))
    return StepResult(
        result={"etags": etags, "sums": sums, "stages": stages.as_dict()},
        outputs=tuple(outputs),
    )


def finish(payload: Payload) -> StepResult:
    """Add what the tasks left over as the last parts of a shard, complete its upload, and read all of it back."""
    store, stages = open_store(payload["output"]), Stages()
    key = artifact_key(*_place(payload), payload["shard"])
    upload = _result(payload, payload["opened"])["uploads"][payload["shard"]]
    made = [_result(payload, digest) for digest in payload["converted"]]
    etags = [etag for one in made for etag in one["etags"]]
    shard = _Shard(store=store, key=key, upload=upload, payload=payload, stages=stages)
    with shard.writer() as writer:
        for _, data in read_ahead(
            _crumb_runs(payload),
            lambda run, view: store.read_into(run.key, run.offset_bytes, view),
            stages,
            buffers=SHARED,
            ahead_bytes=ahead_bytes(payload["block_bytes"]),
        ):
            writer.write(data)
        etags += writer.finish()
    file = shard.completed(etags)
    sums: Sums = {}
    for one in made:
        _add(sums, one["sums"])
    return StepResult(
        result={"file": file.as_dict(), "sums": sums, "stages": stages.as_dict()},
        outputs=(Output(key=key, bytes=file.bytes, sha256=file.sha256),),
    )


def assemble(payload: Payload) -> StepResult:
    """Complete the artifact: config, index and every other file of the source; then manifest and pointer."""
    checkpoint = opened(payload)
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    choice = choose(checkpoint, payload["recipe"])
    made = [_result(payload, own) for own in payload["shard_records"]]
    written = [ArtifactFile(**one["file"]) for one in made]
    shards = {
        file.path: read_header(store, artifact_key(name, digest, file.path)).tensors for file in written
    }
    sums: Sums = {}
    for one in made:
        _add(sums, one["sums"])
    metrics = _metrics(checkpoint, choice, shards, sums, sum(file.bytes for file in written))
    files = companions(payload, metrics)
    config = config_of(choice, checkpoint.config)
    files[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    if len(shards) > 1:
        files[INDEX] = _index(shards)
    written += write_artifact(store, name, digest, files)
    for other in checkpoint.other_files:
        if other.path not in files:
            written += write_artifact(store, name, digest, {other.path: read_file(checkpoint.root, other)})
    written.sort(key=lambda file: file.path)
    return complete(payload, metrics, kind="checkpoint", form="safetensors", files=written)


def opened(payload: Payload) -> Checkpoint:
    """The headers of the checkpoint as the plan saw it.

    Raises SourceChanged if it is another one now, ModelError if it is quantized already.
    """
    model = payload["model"]
    checkpoint = open_checkpoint(model["uri"])
    etags = {file["path"]: file["etag"] for file in model["files"]}
    for file in (*checkpoint.files, *checkpoint.other_files):
        if etags.get(file.path) != file.etag:
            raise SourceChanged(
                f"{checkpoint.root}/{file.path} has changed since the run began; run again when the upload is complete"
            )
    check_plain(checkpoint)
    return checkpoint


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Bytes of an object, and what their checksum must be if that is known."""

    key: str
    offset_bytes: int
    bytes: int
    crc32: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard's multipart upload, and the part of it that a task's payload describes."""

    store: ObjectStore
    key: str
    upload: str
    payload: Payload
    stages: Stages

    def writer(self) -> PartWriter:
        """Takes the bytes of the payload's parts, and sends them."""
        return PartWriter(
            self._send,
            self.payload["parts"],
            self.stages,
            buffers=SHARED,
            first_number=self.payload["first_part"],
            offset_bytes=self.payload["offset_bytes"],
        )

    def completed(self, etags: Sequence[str]) -> ArtifactFile:
        """Make the shard of its parts and read it back. Raises ArtifactCorrupt for other bytes than were sent."""
        store, key, size = self.store, self.key, self.payload["shard_bytes"]
        try:
            store.complete_upload(key, self.upload, etags)
        except UploadGone:
            self._require_completed()
        etag = store.head(key).etag

        def read(part: _Run, view: memoryview) -> None:
            store.read_into(key, part.offset_bytes, view, etag=etag)
            if zlib.crc32(view) != part.crc32:
                store.delete(key)
                raise ArtifactCorrupt(
                    f"{store.uri}/{key} reads back differently from what was written: check the store and run again"
                )

        digest = hashlib.sha256()
        ahead = ahead_bytes(self.payload["block_bytes"])
        sent = (
            _Run(key=key, offset_bytes=part.offset_bytes, bytes=part.size_bytes, crc32=part.crc32)
            for part in parse_parts(etags, key)
        )
        for _, view in read_ahead(sent, read, self.stages, buffers=SHARED, ahead_bytes=ahead):
            self.stages.compute.timed(len(view), partial(digest.update, view))
        return ArtifactFile(path=self.payload["shard"], bytes=size, sha256=digest.hexdigest())

    def _send(self, number: int, offset_bytes: int, data: memoryview) -> str:
        """Upload a part, unless the whole shard is there already; its etag."""
        try:
            return self.store.upload_part(
                self.key, self.upload, number=number, offset=offset_bytes, data=data
            )
        except UploadGone:
            self._require_completed()
            return str(Part(offset_bytes, len(data), zlib.crc32(data)))

    def _require_completed(self) -> None:
        """An upload is gone once it is completed: by a run that died then, or by another one. Raises UploadGone."""
        size = self.payload["shard_bytes"]
        if not exists(self.store, self.key) or self.store.head(self.key).size_bytes != size:
            raise UploadGone(
                f"{self.store.uri}/{self.key}: its unfinished upload is gone: run again to begin it anew"
            )


class _Crumbling:
    """Sends the body on to `write`, and keeps what belongs into the tail."""

    def __init__(self, write: Callable[[memoryview], None]) -> None:
        self.body = write
        self._crumbs: dict[int, list[bytes]] = {}

    def crumb(self, kind: int, data: memoryview) -> None:
        self._crumbs.setdefault(kind, []).append(bytes(data))

    def joined(self) -> bytes:
        """All crumbs, class after class."""
        return b"".join(part for kind in sorted(self._crumbs) for part in self._crumbs[kind])


def _whole_shard(payload: Payload, store: ObjectStore, key: str, stages: Stages) -> tuple[ArtifactFile, Sums]:
    """Header, body and tail in one go: one request if they are few bytes, else an upload of its own."""
    header = framed(payload["header"])
    if payload["shard_bytes"] < ONE_PUT_BYTES:
        bodies = [header]
        sink = _Crumbling(lambda data: bodies.append(bytes(data)))
        sums = _stream(payload, sink, stages)
        files = {payload["shard"]: b"".join((*bodies, sink.joined()))}
        (file,) = stages.write.timed(
            payload["shard_bytes"], lambda: write_artifact(store, *_place(payload), files)
        )
        return file, sums
    upload = store.create_upload(key)
    shard = _Shard(store=store, key=key, upload=upload, payload=payload, stages=stages)
    try:
        with shard.writer() as writer:
            writer.write(memoryview(header))
            sink = _Crumbling(writer.write)
            sums = _stream(payload, sink, stages)
            writer.write(memoryview(sink.joined()))
            etags = writer.finish()
        return shard.completed(etags), sums
    except StorageError:
        with suppress(StorageError):
            store.abort_upload(key, upload)
        raise


def _stream(payload: Payload, sink: _Crumbling, stages: Stages) -> Sums:
    source, pieces = open_store(payload["root"]), pieces_of(payload)
    if any(piece.item.needs_torch for piece in pieces):
        use_one_thread()

    def read(block: Block, view: memoryview) -> None:
        source.read_into(block.path, block.offset_bytes, view, etag=block.etag)

    return stream(payload["uri"], pieces, read, sink, stages, block_bytes=payload["block_bytes"])


def _crumb_runs(payload: Payload) -> Iterator[_Run]:
    """The tail: for each class the crumbs of all tasks in their order."""
    kinds = sorted({kind for crumbs in payload["crumbs"] for kind, _ in crumbs})
    for kind in kinds:
        for digest, crumbs in zip(payload["converted"], payload["crumbs"], strict=True):
            start = 0
            for own, size in crumbs:
                if own == kind:
                    yield _Run(key=beside(digest, CRUMBS), offset_bytes=start, bytes=size)
                start += size


def _place(payload: Payload) -> tuple[str, str]:
    """Name and digest of the artifact."""
    return payload["name"], payload["artifact"]


def _result(payload: Payload, digest: str) -> Mapping[str, Any]:
    """What an earlier task recorded; what it stored is proved when the shard is read back."""
    return record(payload, digest, proved=False).result


def _add(sums: Sums, more: Mapping[str, Sequence[float]]) -> None:
    for layer, (signal, noise) in more.items():
        before = sums.get(layer, (0.0, 0.0))
        sums[layer] = before[0] + signal, before[1] + noise


def _index(shards: _Headers) -> bytes:
    weight_map = {name: path for path, tensors in shards.items() for name in tensors}
    total = _tensor_bytes(shards)
    return canonical_json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensor_bytes(shards: _Headers) -> int:
    return sum(tensor.size_bytes for tensors in shards.values() for tensor in tensors.values())


def _metrics(
    checkpoint: Checkpoint, choice: Choice, shards: _Headers, sums: Sums, size_bytes: int
) -> dict[str, Any]:
    counts = sum(math.prod(place.info.shape) for place in checkpoint.tensors.values())
    before_bytes = sum(file.bytes for file in checkpoint.files)
    side = {"metric": None, "value": None, "parameters": counts}
    items = {item.layer: item for item in choice.items if item.layer is not None}
    return {
        "before": {**side, "bytes": before_bytes},
        "after": {**side, "bytes": size_bytes},
        "compression_ratio": round(before_bytes / size_bytes, 4),
        "bits_per_weight": round(8 * _tensor_bytes(shards) / max(1, counts), 4),
        "layers": [
            _layer_entry(layer, items[layer.name], sums.get(layer.name), choice.skipped.get(layer.name))
            for layer in choice.known
            if layer.name in items
        ],
        "warnings": list(choice.warnings),
    }


def _layer_entry(
    layer: Layer, item: Item, squares: tuple[float, float] | None, reason: str | None
) -> dict[str, Any]:
    scheme = item.treatment.scheme
    if reason is None and item.treatment == KEPT:
        reason = "quantize: not among the targets"
    return {
        "name": layer.name,
        "kind": layer.kind,
        "sparsity": _sparsity(item),
        "removed_units": [],
        "num_bits": scheme.num_bits if scheme else None,
        "group_size": scheme.group_size if scheme else None,
        "bytes_before": item.size_bytes,
        "bytes_after": sum(map(stored_bytes, item.stored)),
        "sqnr_db": None if squares is None else _decibels(*squares),
        "skipped": reason,
    }


def _sparsity(item: Item) -> float:
    """The share of its weights that were zeroed."""
    options = dict(item.treatment.sparsity)
    if not options:
        return 0.0
    from fleetpress.compression.sparsity import zeroed

    return round(zeroed(options, item.shape) / math.prod(item.shape), 6)


def _decibels(signal: float, noise: float) -> float | None:
    """Signal to noise; JSON has no infinity: what did not change has no noise to measure."""
    return round(10 * math.log10(signal / noise), 4) if signal and noise else None
