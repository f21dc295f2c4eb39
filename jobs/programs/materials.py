"""What steps build on: source bytes, tensors of earlier steps, arrays of data, and programs derived from them.

Intermediates in the store are tensors and small records only. A program at any stage is derived again from the source
archive by pure functions, so a resumed run builds exactly what an undisturbed one had in memory. Each process keeps
the programs and arrays that it used last; their keys are digests, so they are never stale.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import count
from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.program import aliases, tensors, with_tensors
from fleetpress.compression.pruning import delete
from fleetpress.compression.pruning.compensate import with_compensation
from fleetpress.compression.quantization.packing import unpack
from fleetpress.storage.data import read_shard
from fleetpress.storage.errors import InvalidData, InvalidModelFile
from fleetpress.storage.programs import load_program
from fleetpress.storage.sources import SourceFile
from fleetpress.storage.store import open_store

from ..errors import ModelError
from ..handover import (
    Payload,
    read_file,
    record,
    store_bytes,
)
from ..tasks import Output
from .held_bytes import held_bytes

T = TypeVar("T")

_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LEAST_KEPT = 6  # large values that a process remembers in any case: programs of a model, and two data sets
_KEPT_BYTES = 1 << 28  # of all large values that it remembers beyond those
_SMALL_BYTES = 1 << 22  # of values that large ones do not push out: what was measured may have taken minutes
_KEPT_SMALL_BYTES = 1 << 26  # of all of them
_memory: OrderedDict[str, tuple[Any, int]] = OrderedDict()


def remembered(key: str, build: Callable[[], T]) -> T:
    """`build()`, or what it gave when this process last asked for `key`. Values are shared: never modify them."""
    if key in _memory:
        _memory.move_to_end(key)
    else:
        value = build()
        _memory[key] = value, held_bytes(value)
        _make_room()
    found: T = _memory[key][0]
    return found


def _make_room() -> None:
    """Drop what was asked for longest ago, large values for large ones and small values for small ones."""
    for is_small, least, most in ((False, _LEAST_KEPT, _KEPT_BYTES), (True, 1, _KEPT_SMALL_BYTES)):
        sizes = {key: size for key, (_, size) in _memory.items() if (size < _SMALL_BYTES) == is_small}
        total = sum(sizes.values())
        for key in list(sizes)[:-least]:
            if total <= most:
                break
            total -= _memory.pop(key)[1]


def forget() -> None:
    """Drop everything that this process remembers."""
    _memory.clear()


def source_bytes(payload: Payload) -> bytes:
    """The model's own file, checked against the etag that the plan saw."""
    model = payload["model"]
    return read_file(model["root"], SourceFile(**model["files"][0]))


def source_program(payload: Payload) -> ExportedProgram:
    """The program as it came: the checked archive, or what the module's factory was exported to."""
    exported = payload["stages"].get("export")
    if exported:
        return remembered(exported, lambda: load_program(_output(payload, exported, ".pt2")))
    etag = payload["model"]["files"][0]["etag"]
    return remembered(f"source-{etag}", lambda: _loaded(payload))


def _loaded(payload: Payload) -> ExportedProgram:
    uri = payload["model"]["uri"]
    with naming(uri, InvalidModelFile):
        program = load_program(source_bytes(payload))
    state = tensors(program)
    check_finite(uri, {name: state[name] for name in program.graph_signature.parameters})
    return program


@contextmanager
def naming(where: str, *about: type[Exception]) -> Iterator[None]:
    """Inside, errors of these kinds say which file they are about: those who read bytes or arrays do not know."""
    try:
        yield
    except about as error:
        raise type(error)(f"{where}: {error}") from None


def check_finite(where: str, weights: Mapping[str, Tensor]) -> None:
    """Raises ModelError with the first weight that holds NaN or infinity: nothing good can come of it."""
    for name, value in weights.items():
        if value.dtype in _CHECKED and not value.isfinite().all():
            what = "NaN" if value.isnan().any() else "infinite"
            count = int((~value.isfinite()).sum())
            raise ModelError(
                f"{where}: {name} holds {what} values ({count} of {value.numel()} are not finite); "
                "take the last good state of the model"
            )


def trained_program(payload: Payload) -> ExportedProgram:
    """The source with the trained weights, if the recipe trains."""
    digest = payload["stages"].get("train")
    if not digest:
        return source_program(payload)
    return remembered(digest, lambda: _with_stored(payload, digest, source_program(payload)))


def round_program(payload: Payload) -> ExportedProgram:
    """What the round of pruning at hand starts from: the trained program, pruned and tuned in all rounds before."""
    program = trained_program(payload)
    for prune, finetune in payload["stages"].get("rounds", ()):
        program = _tuned(payload, finetune, partial(_pruned, payload, prune, program))
    return program


def pruned_program(payload: Payload) -> ExportedProgram:
    """The trained program without the deleted units, or with weights zeroed, if the recipe prunes."""
    digest = payload["stages"].get("prune")
    return _pruned(payload, digest, round_program(payload)) if digest else round_program(payload)


def _pruned(payload: Payload, digest: str, program: ExportedProgram) -> ExportedProgram:
    """The program without what a prune task deleted, its corrections for that made before; or with what it zeroed."""

    def build() -> ExportedProgram:
        done = record(payload, digest)
        if "zeroed" in done.result:
            return _zeroed(payload, digest, program)
        removed = done.result.get("round_removed", done.result["removed"])
        corrected = stored_tensors(payload, digest) if done.outputs else {}
        program_then = with_compensation(program, corrected) if corrected else program
        return delete(program_then, removed, done.result.get("structure", ()))

    return remembered(digest, build)


def _zeroed(payload: Payload, digest: str, program: ExportedProgram) -> ExportedProgram:
    state = tensors(program) | stored_tensors(payload, digest)  # a method may have moved what it kept
    masks = keep_masks(payload)
    values = {name: state[name].detach().masked_fill(~mask, 0) for name, mask in masks.items()}
    return with_tensors(program, _with_tied(program, values))


def keep_masks(payload: Payload) -> dict[str, Tensor]:
    """Where the weights that the prune task zeroed are kept (True), by state name; of tied weights the first one's."""
    digest = payload["stages"].get("prune")
    names = record(payload, digest).result.get("zeroed", ()) if digest else ()
    if not names:
        return {}
    stored, state = stored_tensors(payload, digest), tensors(trained_program(payload))
    return {
        name: unpack(stored[KEEP_MASK + name], 1, state[name].numel()).bool().view(state[name].shape)
        for name in names
    }


def final_program(payload: Payload) -> ExportedProgram:
    """The pruned program with the fine-tuned weights, if the recipe fine-tunes."""
    digest = payload["stages"].get("finetune")
    if not digest:
        return pruned_program(payload)
    return _tuned(payload, digest, partial(pruned_program, payload))


def _tuned(payload: Payload, digest: str, pruned: Callable[[], ExportedProgram]) -> ExportedProgram:
    return remembered(digest, lambda: _with_stored(payload, digest, pruned()))


def calibration(payload: Payload, stage: str = "calibrate") -> CalibrationStatistics | None:
    """What the layers of the program read, merged from the tasks in their order; None without them.

    The stage `calibrate` looked at the final program, `observe` at what is to be pruned or searched.
    """
    digests = payload["stages"].get(stage)
    if not digests:
        return None

    def merged() -> CalibrationStatistics:
        return CalibrationStatistics.summed(statistics_parts(payload, digests))

    return remembered("calibration-" + digests[-1], merged)


def arrays(files: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """All samples of the shards, in file order: arrays by name, first dimension = samples."""
    key = (
        "arrays-"
        + hashlib.sha256(repr([(file["etag"], file.get("fold")) for file in files]).encode()).hexdigest()
    )

    def build() -> dict[str, Tensor]:
        shards = [shard_arrays(file) for file in files]
        for file, shard in zip(files[1:], shards[1:], strict=True):
            _check_alike(files[0], shards[0], file, shard)
        return {name: torch.cat([shard[name] for shard in shards]) for name in sorted(shards[0])}

    return remembered(key, build)


def _check_alike(
    first: Mapping[str, Any],
    wanted: Mapping[str, Tensor],
    file: Mapping[str, Any],
    shard: Mapping[str, Tensor],
) -> None:
    """Raises InvalidData for shards that cannot be one data set; dtypes may differ, the wider one is taken."""
    one, other = _sample_shapes(wanted), _sample_shapes(shard)
    if one != other:
        raise InvalidData(
            f"{file['root']}/{file['path']} holds samples of {other}, but {first['path']} of {one}; "
            "write all shards of a data set alike"
        )


def _sample_shapes(shard: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shard[name].shape[1:]) for name in sorted(shard)}


def shard_arrays(file: Mapping[str, Any]) -> dict[str, Tensor]:
    """One shard's arrays as tensors; of a shard with a fold the samples of that."""
    place = SourceFile(path=file["path"], etag=file["etag"], bytes=file["bytes"])
    found = read_shard(open_store(file["root"]), place)
    fold = file.get("fold")
    if fold is not None:
        samples = np.arange(min(len(value) for value in found.values()))
        chosen = (samples % fold["of"] == fold["index"]) != fold["is_left_out"]
        found = {name: value[: len(samples)][chosen] for name, value in found.items()}
    # Parquet's arrays are read-only views, which torch warns about.
    return {
        name: torch.from_numpy(value if value.flags.writeable else value.copy())
        for name, value in found.items()
    }


def first_arrays(files: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Those of the first shard that holds samples; of the first one, if none does."""
    found = (arrays([file]) for file in files)
    return next((some for some in found if count(some)), arrays(files[:1]))


def store_tensors(payload: Payload, values: Mapping[str, Tensor], *, suffix: str = ".safetensors") -> Output:
    """Write tensors beside the record of the running task; tied tensors once."""
    tied = aliases(values)
    plain = {name: value.detach().contiguous() for name, value in values.items() if name not in tied}
    return store_bytes(payload, save(plain), suffix)


def stored_tensors(payload: Payload, digest: str, *, suffix: str = ".safetensors") -> dict[str, Tensor]:
    """The tensors that an earlier task stored, their hash checked."""
    return dict(load(_output(payload, digest, suffix)))


def statistics_parts(payload: Payload, digests: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What earlier tasks stored that looked at chunks of the train data; some found no samples.

    Raises ModelError if all did not.
    """
    is_empty = True
    for digest in digests:
        outputs = record(payload, digest).outputs
        if outputs:
            is_empty = False
            yield dict(load(_checked(payload, outputs, ".safetensors")))
    if is_empty:
        raise ModelError(
            "no shard of the train data holds a sample, or as many as the batches that the program was exported for; "
            "give more"
        )


def _output(payload: Payload, digest: str, suffix: str) -> bytes:
    return _checked(payload, record(payload, digest).outputs, suffix)


def _checked(payload: Payload, outputs: Sequence[Output], suffix: str) -> bytes:
    output = next(item for item in outputs if item.key.endswith(suffix))
    data = open_store(payload["output"]).get(output.key)
    if hashlib.sha256(data).hexdigest() != output.sha256:
        raise ModelError(
            f"{payload['output']}/{output.key} is not what was written (its hash differs); delete it and run again"
        )
    return data


def _with_stored(payload: Payload, digest: str, program: ExportedProgram) -> ExportedProgram:
    values = {
        name: value
        for name, value in stored_tensors(payload, digest).items()
        if not name.startswith((STATISTICS, SCALES, ZERO_POINTS, ENTRIES))
    }
    return with_tensors(program, _with_tied(program, values))


def _with_tied(program: ExportedProgram, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values, with those of tied names beside them."""
    tied = aliases(tensors(program)).items()
    return values | {name: values[owner] for name, owner in tied if owner in values}


KEEP_MASK = "keep_mask/"  # prefix of bit-packed masks among a prune task's tensors
STATISTICS = "statistics/"  # prefixes of what is no weight among a training task's tensors
SCALES = "scales/"
ZERO_POINTS = "zero_points/"
ENTRIES = "codebook_entries/"
