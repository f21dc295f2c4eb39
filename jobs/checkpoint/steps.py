"""The steps of a bare checkpoint: open uploads, convert runs of tensors, finish shards, assemble the artifact.

Every task reads its ranges of the source and writes its parts of a shard's multipart upload itself; no task holds a
tensor, and nothing but small records passes through the driver. A shard that one task makes needs no other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from fleetpress.storage.artifact import ArtifactFile, artifact_key, write_artifact
from fleetpress.storage.checkpoint import Checkpoint, open_checkpoint
from fleetpress.storage.errors import SourceChanged, StorageError, StoreUnreachable
from fleetpress.storage.safetensors_header import TensorInfo, read_header
from fleetpress.storage.safetensors_layout import framed
from fleetpress.storage.sources import CONFIG, INDEX
from fleetpress.storage.store import ObjectStore, open_store
from fleetpress.storage.streams import ONE_PUT_BYTES, Stages

from ..errors import ModelError
from ..handover import Payload, beside, read_file, record
from ..manifest import companions, complete
from ..tasks import Output, StepResult
from ..threads import use_one_thread
from .choice import Choice, check_plain, choose, config_of
from .inbound import Ranges, Received, is_proved, merged
from .layout import Item, plan_shards
from .metrics import add_up, index_of, metrics_of
from .quality import quality
from .shard import Crumbling, Run, Shard
from .stream import Block, Solved, Sums, stream
from .tasks import pieces_of

CRUMBS = ".crumbs"

Tensors = Mapping[str, TensorInfo]


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
        file, sums, received = _whole_shard(payload, store, key, stages)
        return StepResult(
            result={
                "file": file.as_dict(),
                "sums": sums,
                "received": _with_solved(payload, received),
                "stages": stages.as_dict(),
            },
            outputs=(Output(key=key, bytes=file.bytes, sha256=file.sha256),),
        )
    upload = _result(payload, payload["opened"])["uploads"][payload["shard"]]
    shard = Shard(store=store, key=key, upload=upload, payload=payload, stages=stages)
    source = _received(payload)
    with shard.writer() as writer:
        sink = Crumbling(writer.write)
        if payload["header"]:
            writer.write(memoryview(framed(payload["header"])))
        sums = _stream(payload, source, sink, stages)
        etags = writer.finish()
    outputs = [Output(key=key, bytes=payload["shard_bytes"], sha256="", upload=upload)]
    crumbs = sink.joined()
    if crumbs:
        beside_key = beside(payload["digest"], CRUMBS)
        store.put(beside_key, crumbs)
        outputs.append(Output(key=beside_key, bytes=len(crumbs), sha256=hashlib.sha256(crumbs).hexdigest()))
    return StepResult(
        result={
            "etags": etags,
            "crumbs": sink.checksums(),
            "sums": sums,
            "received": _with_solved(payload, source.ranges()),
            "stages": stages.as_dict(),
        },
        outputs=tuple(outputs),
    )


def finish(payload: Payload) -> StepResult:
    """Add what the tasks left over as the last parts of a shard, complete its upload, and read all of it back."""
    store, stages = open_store(payload["output"]), Stages()
    key = artifact_key(*_place(payload), payload["shard"])
    upload = _result(payload, payload["opened"])["uploads"][payload["shard"]]
    made = [_result(payload, digest) for digest in payload["converted"]]
    etags = [etag for one in made for etag in one["etags"]]
    shard = Shard(store=store, key=key, upload=upload, payload=payload, stages=stages)
    with shard.writer() as writer:
        for data in shard.read(_crumb_runs(payload["converted"], made)):
            writer.write(data)
        etags += writer.finish()
    file = shard.completed(etags)
    sums: Sums = {}
    for one in made:
        add_up(sums, one["sums"])
    return StepResult(
        result={
            "file": file.as_dict(),
            "sums": sums,
            "received": merged(one["received"] for one in made),
            "made_of": list(payload["converted"]),
            "stages": stages.as_dict(),
        },
        outputs=(Output(key=key, bytes=file.bytes, sha256=file.sha256),),
    )


def assemble(payload: Payload) -> StepResult:
    """Complete the artifact: config, index and every other file of the source; then manifest and pointer."""
    checkpoint = opened(payload)
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    choice = choose(checkpoint, payload["recipe"])
    made = {own: _result(payload, own) for own in payload["shard_records"]}
    _prove_received(payload, made)
    written = [ArtifactFile(**one["file"]) for one in made.values()]
    shards = {
        file.path: read_header(store, artifact_key(name, digest, file.path)).tensors for file in written
    }
    _prove_headers(payload, made, choice, shards)
    sums: Sums = {}
    for one in made.values():
        add_up(sums, one["sums"])
    methods = {
        layer: method
        for own in payload.get("solvers", ())
        for layer, method in _result(payload, own)["methods"].items()
    }
    found = quality(payload)
    size_bytes = sum(file.bytes for file in written)
    metrics = metrics_of(
        checkpoint, choice, shards, sums, size_bytes=size_bytes, methods=methods, quality=found
    )
    if found is not None and found.verdict:
        for file in written:
            store.delete(artifact_key(name, digest, file.path))
        return StepResult(result={"state": "rejected", "reason": found.verdict, "metrics": metrics})
    files = companions(payload, metrics)
    config = config_of(choice, checkpoint.config)
    files[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    if len(shards) > 1:
        files[INDEX] = index_of(shards)
    written += write_artifact(store, name, digest, files)
    for other in checkpoint.other_files:
        if other.path not in files:
            written += write_artifact(store, name, digest, {other.path: read_file(checkpoint.root, other)})
    written.sort(key=lambda file: file.path)
    done = complete(payload, metrics, kind="checkpoint", form="safetensors", files=written)
    if payload.get("spilled"):
        from .spill import delete_spilled

        # Who dies on the way leaves what gc finds by these records.
        delete_spilled(payload, payload["spilled"], records=False)
    return done


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


def _prove_received(payload: Payload, made: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare what all tasks together have read with what the server keeps of the source.

    Raises ModelError, once everything made of damaged bytes is gone: running again then reads them anew.
    """
    source = open_store(payload["model"]["root"])
    etags = {file["path"]: file["etag"] for file in payload["model"]["files"]}
    for path, ranges in merged(one["received"] for one in made.values()).items():
        try:
            is_proved(source, path, ranges, source.stored_crc32(path, etag=etags[path]))
        except StoreUnreachable as error:
            _drop(payload, {own: one for own, one in made.items() if path in one["received"]})
            _drop_solved(payload)
            raise ModelError(f"{error}; nothing was published, run again to read them anew") from None


def _prove_headers(
    payload: Payload, made: Mapping[str, Mapping[str, Any]], choice: Choice, shards: Mapping[str, Tensors]
) -> None:
    """Compare the shards with what the source's headers say now: the plan's own look at them was a range, too.

    Raises ModelError, once everything made of a damaged header is gone.
    """
    planned = {shard.path: shard.tensors for shard in plan_shards(choice.items)}
    for own, one in made.items():
        path = one["file"]["path"]
        wanted = {(tensor.name, tensor.dtype, tensor.shape) for tensor in planned.get(path, ())}
        if wanted != {(info.name, info.dtype, info.shape) for info in shards[path].values()}:
            _drop(payload, {own: one})
            raise ModelError(
                f"{payload['model']['uri']}: the header of a file was damaged on its way here (it is another one "
                "now than when the run began); nothing was published, run again to read it anew"
            )


def _drop(payload: Payload, made: Mapping[str, Mapping[str, Any]]) -> None:
    """Remove shards, and the records of the tasks that made them: they are done again by the next run."""
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    for own, one in made.items():
        store.delete(artifact_key(name, digest, one["file"]["path"]))
        for record_of in (own, *one.get("made_of", ())):
            store.delete(beside(record_of, ".json"))


def _drop_solved(payload: Payload) -> None:
    """Remove what was solved with what may be damaged."""
    if payload.get("solvers"):
        from .spill import delete_spilled

        delete_spilled(payload, payload["solvers"])


def _whole_shard(
    payload: Payload, store: ObjectStore, key: str, stages: Stages
) -> tuple[ArtifactFile, Sums, Ranges]:
    """Header, body and tail in one go: one request if they are few bytes, else an upload of its own.

    Also the ranges of source files that other tasks read, too: those that only this one read are proved.
    """
    header, source = framed(payload["header"]), _received(payload)
    if payload["shard_bytes"] < ONE_PUT_BYTES:
        bodies = [header]
        sink = Crumbling(lambda data: bodies.append(bytes(data)))
        sums = _stream(payload, source, sink, stages)
        unproved = source.unproved()
        files = {payload["shard"]: b"".join((*bodies, sink.joined()))}
        (file,) = stages.write.timed(
            payload["shard_bytes"], lambda: write_artifact(store, *_place(payload), files)
        )
        return file, sums, unproved
    upload = store.create_upload(key)
    shard = Shard(store=store, key=key, upload=upload, payload=payload, stages=stages)
    try:
        with shard.writer() as writer:
            writer.write(memoryview(header))
            sink = Crumbling(writer.write)
            sums = _stream(payload, source, sink, stages)
            writer.write(memoryview(sink.joined()))
            etags = writer.finish()
        unproved = source.unproved()
        return shard.completed(etags), sums, unproved
    except StorageError:
        with suppress(StorageError):
            store.abort_upload(key, upload)
        raise


def _received(payload: Payload) -> Received:
    return Received(open_store(payload["root"]), payload["files"])


def _with_solved(payload: Payload, ranges: Ranges) -> Ranges:
    """What a task has read, and those that solved some of its matrices."""
    solvers = dict.fromkeys(payload["solved_by"].values())
    return (
        merged([ranges, *(_result(payload, digest)["received"] for digest in solvers)]) if solvers else ranges
    )


def _solved(payload: Payload, item: Item) -> Solved:
    """A matrix as a task before has left it."""
    from .spill import read_parts  # torch: not needed by those who only carry bytes

    digest = payload["solved_by"][item.name]
    made = _result(payload, digest)
    signal, noise = made["sums"].get(item.layer, (0.0, 0.0))
    return Solved(parts=read_parts(payload, digest, made["parts"][item.name]), signal=signal, noise=noise)


def _stream(payload: Payload, source: Received, sink: Crumbling, stages: Stages) -> Sums:
    pieces = pieces_of(payload)
    if any(piece.item.needs_torch for piece in pieces):
        use_one_thread()

    def read(block: Block, view: memoryview) -> None:
        source.read_into(block.path, block.offset_bytes, view, etag=block.etag)

    solved = partial(_solved, payload)
    return stream(
        payload["uri"], pieces, read, sink, stages, block_bytes=payload["block_bytes"], solved=solved
    )


def _crumb_runs(digests: Sequence[str], made: Sequence[Mapping[str, Any]]) -> Iterator[Run]:
    """The tail: for each class the crumbs of all tasks in their order."""
    for wanted in sorted({kind for one in made for kind, _, _ in one["crumbs"]}):
        for digest, one in zip(digests, made, strict=True):
            start = 0
            for kind, size, crc32 in one["crumbs"]:
                if kind == wanted:
                    yield Run(key=beside(digest, CRUMBS), offset_bytes=start, bytes=size, crc32=crc32)
                start += size


def _place(payload: Payload) -> tuple[str, str]:
    """Name and digest of the artifact."""
    return payload["name"], payload["artifact"]


def _result(payload: Payload, digest: str) -> Mapping[str, Any]:
    """What an earlier task recorded; what it stored is proved when the shard is read back."""
    return record(payload, digest, proved=False).result
