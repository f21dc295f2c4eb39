"""The functions that a worker runs: read -> compute -> write -> small result. One per kind of task.

Each is a plain function of a task's payload; executors decide where it runs. Data first, record second: a step stores
its tensors itself and returns a `StepResult`, which becomes the record.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .ceiling import give_back
from .checkpoint import steps as checkpoint_steps
from .handover import Payload
from .tasks import StepResult, Task
from .threads import use_one_thread

if TYPE_CHECKING:
    from fleetpress.compression.collectives import Collective

# Those of a checkpoint import torch only if their recipe needs it; those of a program lie behind it.
_CHECKPOINT_STEPS: dict[str, Callable[[Payload], StepResult]] = {
    "open": checkpoint_steps.open_uploads,
    "convert": checkpoint_steps.convert,
    "finish": checkpoint_steps.finish,
    "assemble": checkpoint_steps.assemble,
}


_LARGE_KINDS = ("advance", "solve", "score")  # that hold blocks of a model for a while


def run_step(task: Task) -> StepResult:
    """Run one task in this process. Raises the errors of the three packages; everything else is our bug."""
    step = _CHECKPOINT_STEPS.get(task.kind) or _calibrating_step(task.kind)
    if step is None:
        step = _program_step(task)
        use_one_thread()
    try:
        return step(task.payload)
    finally:
        if task.kind in _LARGE_KINDS:
            give_back()


def _calibrating_step(kind: str) -> Callable[[Payload], StepResult] | None:
    """The step of a checkpoint that is calibrated: torch lies behind it, and transformers."""
    if kind == "advance":
        from .checkpoint.advancing import advance

        return advance
    if kind == "solve":
        from .checkpoint.solving import solve

        return solve
    if kind == "score":
        from .checkpoint.scoring import score

        return score
    return None


def _program_step(task: Task) -> Callable[[Payload], StepResult]:
    """The step of a program; `auto` has some of its own, its last one among them."""
    if task.kind in ("sense", "trial") or "is_search" in task.payload:
        from .auto.steps import STEPS as AUTO_STEPS

        return AUTO_STEPS[task.kind]
    from .programs.steps import STEPS

    return STEPS[task.kind]


def run_rank(task: Task, collective: "Collective") -> StepResult | None:
    """Run one rank of a data-parallel training task; rank 0 stores the weights and answers."""
    from .programs.steps import train_rank

    return train_rank(task.payload, task.kind, collective)
