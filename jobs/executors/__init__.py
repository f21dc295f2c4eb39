"""Executors run tasks somewhere. All run the same plain step function through `worker.execute`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, Protocol

from ..tasks import Failure, Task, TaskRecord
from ..worker import RunRank, RunStep
from .address import given_address

if TYPE_CHECKING:
    from ..runs.progress import Listener

ExecutorName = Literal["inline", "ray"]

TASK_SECONDS = 6 * 3600.0  # how long one task may take, unless the spec says otherwise


class Executor(Protocol):
    """Where tasks run. The driver keeps at most `slots` tasks submitted that were not handed back."""

    @property
    def slots(self) -> int:
        """How many tasks can make progress at once, at least 1; may change while a cluster grows or shrinks."""
        ...

    def submit(self, task: Task) -> None:
        """Start the task, or queue it; returns at once. Submitted again after a failure, it is a new attempt."""
        ...

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskRecord | Failure]]:
        """Ends of submitted tasks as (task id, end): at least one, unless `timeout_seconds` pass or none is left."""
        ...

    def close(self) -> None:
        """Drop what has not ended and release what the executor started; records already written stay."""
        ...


def open_executor(
    name: ExecutorName,
    run_step: RunStep,
    ledger_uri: str,
    *,
    run_rank: RunRank | None = None,
    address: str | None = None,
    mark: str = "",
    memory_bytes: int = 0,
    task_seconds: float = TASK_SECONDS,
    gpus: float = 0.0,
) -> Executor:
    """The executor called `name`, whose workers write records to the ledger at `ledger_uri`.

    `run_step` must be a function that workers can import (or a `functools.partial` of one); so must `run_rank`,
    which replaces it on each worker of a training task with `workers` > 1, where the executor has several.
    `address` is a Ray cluster's (`host:port`, `ray://host:port`, `auto`); without one, RAY_ADDRESS counts, then
    a cluster is started on this machine, for this process. Raises ClusterUnreachable. `mark` is the key of an object
    beside the ledger: tasks fail on nodes that see another folder or S3 server in its place.

    `memory_bytes` is the ceiling of a process; tasks run side by side in this one only as far as it allows. A task that
    takes longer than `task_seconds` is given up, where it runs in a process of its own. `gpus` is the most that a task
    asks for: raises UsageError if there is none to be had, before anything is begun.
    """
    if name == "inline":
        from .inline import InlineExecutor, check_gpu

        if gpus:
            check_gpu()
        return InlineExecutor(run_step, ledger_uri, memory_bytes=memory_bytes)
    address = given_address(address)
    if address is None:
        # Ray's own switch for "every port on 127.0.0.1 only", despite its name; read when ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # What a dropped task still had to say is no news for the user.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    from .ray import RayExecutor

    return RayExecutor(
        run_step,
        ledger_uri,
        run_rank=run_rank,
        address=address,
        mark=mark,
        task_seconds=task_seconds,
        gpus=gpus,
    )


def open_metrics(name: ExecutorName, fleet: str) -> Listener | None:
    """A listener that shows the run to Prometheus, where the open executor has a place for it."""
    if name != "ray":
        return None
    from .ray_metrics import RayMetrics

    return RayMetrics(fleet).update
