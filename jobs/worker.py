"""The border between steps and executors: a task goes in, a record or a classified failure comes out.

It runs where the task runs (this process, a Ray worker) and writes the record itself, so the death of the
driver loses nothing that was finished.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fleetpress.compression.errors import CompressionError
from fleetpress.storage.errors import StorageError, StoreUnreachable
from fleetpress.storage.memory import is_out_of_memory
from fleetpress.storage.store import open_store
from fleetpress.storage.traffic import Traffic, counted

from .ceiling import ceiling, needed_bytes
from .errors import FleetpressError
from .ledger import Ledger
from .runs.figures import sized
from .tasks import ErrorClass, Failure, StepResult, Task, TaskRecord
from .threads import torch_is_loaded, use_one_thread

if TYPE_CHECKING:  # the step that trains imports torch, not every user of this module
    from fleetpress.compression.collectives import Collective

RunStep = Callable[[Task], StepResult]
RunRank = Callable[
    [Task, "Collective"], "StepResult | None"
]  # one of several training workers; rank 0 answers

# The first class that fits decides.
_ERROR_CLASSES: tuple[tuple[type[BaseException], ErrorClass], ...] = (
    (StoreUnreachable, "transient"),
    (FleetpressError, "input"),
    (CompressionError, "input"),
    (StorageError, "input"),
    (ConnectionError, "transient"),
)
_MATERIALS = f"{__package__}.programs.materials"


def execute(
    task: Task, run_step: RunStep, ledger_uri: str, *, attempts: int = 1, where: str = ""
) -> TaskRecord | Failure:
    """Run one task on one thread, within the memory it declared, and record it in the ledger at `ledger_uri`.

    `where` is the name of this node.

    No Exception leaves: errors of the three packages become failures with their message, running out of
    memory becomes "memory", and everything else is a bug of ours with its traceback in `details`.
    """
    if torch_is_loaded():  # the step that loads it sees to it itself
        use_one_thread()
    if task.small:
        _forget()
    started = time.perf_counter()
    # The driver of a GPU reserves far more than it uses, which the kernel would count.
    with ceiling(0 if task.gpus else task.memory_bytes), counted() as traffic:
        try:
            step_result = run_step(task)
            cost = _cost(started, where, traffic)
            record = record_of(task, step_result, attempts, cost)
            Ledger(open_store(ledger_uri)).write(record)
        except Exception as error:  # noqa: BLE001 - the border: one bad model must not stop the fleet
            return replace(failure_of(task, error), **_cost(started, where, traffic))
        return record


def _cost(started: float, where: str, traffic: Traffic) -> dict[str, Any]:
    return {
        "seconds": round(time.perf_counter() - started, 6),
        "where": where,
        "bytes_read": traffic.bytes_read,
        "bytes_written": traffic.bytes_written,
    }


def record_of(task: Task, step_result: StepResult, attempts: int, cost: dict[str, Any]) -> TaskRecord:
    """The record of a task that came to this result, with what it cost: seconds, where, bytes read and written."""
    return TaskRecord(
        task=task.id,
        model=task.model,
        kind=task.kind,
        digest=task.digest,
        outputs=step_result.outputs,
        result=step_result.result,
        attempts=attempts,
        fleetpress_version=version("fleetpress"),
        **cost,
    )


def _forget() -> None:
    """Give up what this process keeps from earlier tasks, if it has loaded the module that keeps it."""
    materials = sys.modules.get(_MATERIALS)
    if materials is not None:
        materials.forget()


def failure_of(task: Task, error: BaseException) -> Failure:
    """The failure that an exception of the task's step means."""
    error_class = classify(error)
    text = str(error) or type(error).__name__
    if error_class == "bug":
        text = f"internal error in {task.kind}: {type(error).__name__}: {text}"
    elif error_class == "memory":
        text = _out_of_memory(task, error, text)
    return Failure(
        task=task.id,
        model=task.model,
        reason=" ".join(text.split()),
        error_class=error_class,
        details="".join(traceback.format_exception(error)) if error_class == "bug" else "",
    )


def _out_of_memory(task: Task, error: BaseException, text: str) -> str:
    """How much it needed, as far as that is known: an allocation that failed names its size, not what would follow."""
    needed = needed_bytes(error)
    remedy = "raise resources.memory_per_task or take a larger machine"
    if not needed:
        return f"{task.kind} ran out of memory ({text}): {remedy}"
    if needed <= task.memory_bytes:
        return (
            f"{task.kind} ran out of memory ({text}) with {needed} bytes ({sized(needed)}) in use of the "
            f"{task.memory_bytes} ({sized(task.memory_bytes)}) it may use: {remedy}"
        )
    return (
        f"{task.kind} needs at least {needed} bytes ({sized(needed)}) of memory, more than the {task.memory_bytes} "
        f"({sized(task.memory_bytes)}) it may use: {remedy}"
    )


def classify(error: BaseException) -> ErrorClass:
    """Whose fault an exception is, and so whether a second try makes sense."""
    for kind, error_class in _ERROR_CLASSES:
        if isinstance(error, kind):
            return error_class
    return "memory" if is_out_of_memory(error) else "bug"
