"""The steps of a program: export, train, collect, prune, finetune, calibrate, equalize, quantize, publish."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..handover import Payload, store_bytes
from ..tasks import GPU, Output, StepResult
from . import publishing
from .equalizing import (
    equalize_program,
    equalized_calibration,
    equalized_program,
)
from .materials import (
    STATISTICS,
    arrays,
    final_program,
    naming,
    pruned_program,
    round_program,
    shard_arrays,
    source_bytes,
    source_program,
    store_tensors,
    trained_program,
)
from .objective import loss_name
from .pruning import prune
from .trained_scales import scale_tensors
from .tuning import constraints

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from fleetpress.compression.calibration import CalibrationStatistics
    from fleetpress.compression.collectives import Collective
    from fleetpress.compression.statistics import GradientStatistics


def export(payload: Payload) -> StepResult:
    """A module at the door: its state dict and the code that its factory names become a program."""
    from fleetpress.storage.programs import save_program

    from .modules import build_program

    data = payload["data"]
    example = arrays((data["train"] or data["eval"])[:1]) if data else {}
    program = build_program(payload["model"], source_bytes(payload), example)
    saved = save_program(program, compress=False)
    return StepResult(result={"bytes": len(saved)}, outputs=(store_bytes(payload, saved, ".pt2"),))


def train(payload: Payload) -> StepResult:
    """Gradient descent from the source's weights; gradient statistics are kept on the way."""
    return _alone(payload, "train")


def finetune(payload: Payload) -> StepResult:
    """Gradient descent from the pruned program's weights."""
    return _alone(payload, "finetune")


def _alone(payload: Payload, kind: str) -> StepResult:
    from fleetpress.compression.collectives import ALONE

    result = train_rank(payload, kind, ALONE)
    assert result is not None
    return result


def train_rank(payload: Payload, kind: str, collective: "Collective") -> StepResult | None:
    from fleetpress.compression.device import pick
    from fleetpress.compression.training import TrainOptions
    from fleetpress.compression.training import train as train_program

    program = source_program(payload) if kind == "train" else pruned_program(payload)
    samples = arrays(payload["data"]["train"])
    loss = loss_name(payload["data"], samples)
    options = {key: value for key, value in payload["options"].items() if key != "quantization_aware"}
    result = train_program(
        program,
        samples,
        TrainOptions(**options),
        loss=loss,
        seed=payload["seed"],
        teacher=_teacher(payload, kind, loss),
        collect=kind == "train" and loss != "distillation",
        products=payload.get("products", False),
        **(constraints(payload, program) if kind == "finetune" else {}),
        recurrent=payload.get("recurrent", False),
        weights=payload.get("weights", False),
        collective=collective,
        device=pick(gpu=payload.get("device") == GPU),
    )
    if collective.rank != 0:
        return None
    stored = dict(result.values) | scale_tensors(result.scales)
    if result.statistics is not None:
        stored |= {STATISTICS + name: value for name, value in result.statistics.to_tensors().items()}
    output = store_tensors(payload, stored)
    return StepResult(result={"losses": list(result.losses), "loss": loss}, outputs=(output,))


def _teacher(payload: Payload, kind: str, loss: str) -> "ExportedProgram | None":
    """The original for the loss that knows no targets; for `distill` the model as it was before pruning."""
    if loss == "distillation":
        return source_program(payload)
    if not payload["options"].get("distill"):
        return None
    return source_program(payload) if kind == "train" else trained_program(payload)


def collect(payload: Payload) -> StepResult:
    """Gradient statistics of one chunk of the train data at fixed weights, in file order, before a round of pruning."""
    from fleetpress.compression.device import pick
    from fleetpress.compression.errors import DataMismatchError, TrainingDivergedError
    from fleetpress.compression.modes import fixed_batch
    from fleetpress.compression.training import collect as collect_statistics

    program = round_program(payload)
    statistics: GradientStatistics | None = None
    device = pick(gpu=payload.get("device") == GPU)
    for number, where, samples in _shards(payload, fixed_batch(program) or 1):
        with naming(where, DataMismatchError, TrainingDivergedError):
            found = collect_statistics(
                program,
                samples,
                payload["options"]["batch_size"],
                loss=loss_name(payload["data"], samples),
                seed=_mixed(payload["seed"], number),
                products=payload.get("products", False),
                recurrent=payload.get("recurrent", False),
                weights=payload.get("weights", False),
                device=device,
            )
        statistics = found if statistics is None else statistics.merge(found)
    return StepResult(result={}, outputs=_stored(payload, statistics))


def calibrate(payload: Payload) -> StepResult:
    """What the layers of the final program read, on the samples of one chunk: as many of every shard."""
    by_importance = payload["options"].get("importance") is not None
    return _calibrated(
        payload,
        final_program(payload),
        loss="distillation" if by_importance else None,
        by_importance=by_importance,
    )


def observe(payload: Payload) -> StepResult:
    """The same of the trained program, and gradients of its outputs: what changes of its layers would cost."""
    return _calibrated(payload, round_program(payload), loss="distillation")


def _calibrated(
    payload: Payload, program: "ExportedProgram", *, loss: str | None, by_importance: bool = False
) -> StepResult:
    from fleetpress.compression.batches import evenly
    from fleetpress.compression.errors import DataMismatchError, TrainingDivergedError
    from fleetpress.compression.modes import fixed_batch
    from fleetpress.compression.observing import calibrate as calibrate_program

    options = payload["options"]
    least = fixed_batch(program) or 1
    quota = max(-(-options["samples"] // payload["shards"]), least)
    statistics: CalibrationStatistics | None = None
    for number, where, samples in _shards(payload, least):
        with naming(where, DataMismatchError, TrainingDivergedError):
            found = calibrate_program(
                program,
                evenly(samples, quota),
                options["batch_size"],
                loss=loss,
                by_importance=by_importance,
                seed=_mixed(payload["seed"], number),
            )
        statistics = found if statistics is None else statistics.merge(found)
    looked_at = 0 if statistics is None else statistics.samples
    return StepResult(result={"samples": looked_at}, outputs=_stored(payload, statistics))


def _shards(payload: Payload, least: int) -> Iterator[tuple[int, str, "dict[str, Tensor]"]]:
    """Numbers, places and arrays of the chunk's shards that hold at least so many samples.

    The last shard of a data set may be small, and all of it may lie in the fold that is left out.
    """
    from fleetpress.compression.batches import count

    for number, file in enumerate(payload["files"], payload["first_shard"]):
        found = shard_arrays(file)
        if count(found) >= least:
            yield number, f"{file['root']}/{file['path']}", found


def _stored(
    payload: Payload, statistics: "CalibrationStatistics | GradientStatistics | None"
) -> tuple[Output, ...]:
    """Nothing of a chunk without samples."""
    return () if statistics is None else (store_tensors(payload, statistics.to_tensors()),)


def quantize(payload: Payload) -> StepResult:
    """Quantize one group of layers; codes, scales and zero points are stored."""
    from .quantizing import quantize_group

    return quantize_group(payload, equalized_program(payload), equalized_calibration(payload))


def equalize(payload: Payload) -> StepResult:
    """Move scales between layers, for less error when they are quantized; the changed tensors are stored."""
    return equalize_program(payload)


def _mixed(*parts: int) -> int:
    """One seed from several numbers, the same on every machine."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (1 << 31)
    return mixed


STEPS: dict[str, Callable[[Payload], StepResult]] = {
    "export": export,
    "train": train,
    "collect": collect,
    "calibrate": calibrate,
    "observe": observe,
    "prune": prune,
    "finetune": finetune,
    "equalize": equalize,
    "quantize": quantize,
    "publish": publishing.publish,
}
