"""Runs tasks on a Ray cluster: one CPU a task, small messages only, retries left to the scheduler.

Credentials. On a cluster whose nodes are all this machine, tasks get this process' AWS_* variables as they are
now. They are never sent to another machine: there, each node brings its own (an instance role, a mounted
profile, the variables of its pod).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray

from ..tasks import (
    ErrorClass,
    Failure,
    Task,
    TaskRecord,
    failure_from_json,
    record_from_json,
    task_from_json,
    to_json,
)
from ..worker import RunRank, RunStep, execute
from . import ray_cluster

_TRAINING_KINDS = ("train", "finetune")

# What Ray says in place of the step; the first class that fits decides.
_RAY_ERRORS: tuple[tuple[type[BaseException], ErrorClass, str], ...] = (
    (ray.exceptions.OutOfMemoryError, "memory", "its worker was ended because the node ran out of memory"),
    (ray.exceptions.WorkerCrashedError, "transient", "its worker process died"),
    (ray.exceptions.NodeDiedError, "transient", "its node died"),
    (ray.exceptions.RayTaskError, "bug", "the worker could not start it"),
    (ray.exceptions.RayError, "transient", "Ray lost it"),
)


class RayExecutor:
    """Tasks as Ray tasks. Raises ClusterUnreachable when there is no cluster to join."""

    def __init__(
        self,
        run_step: RunStep,
        ledger_uri: str,
        *,
        run_rank: RunRank | None = None,
        address: str | None = None,
    ) -> None:
        self._owns_cluster = ray_cluster.connect(address)
        self._run_step = run_step
        self._run_rank = run_rank
        self._ledger_uri = ledger_uri
        self._variables = ray_cluster.aws_variables() if ray_cluster.is_on_this_machine() else None
        self._attempts: Counter[str] = Counter()
        self._in_flight: dict[ray.ObjectRef[dict[str, Any]], Task] = {}
        self._refused: list[tuple[str, Failure]] = []

    @property
    def slots(self) -> int:
        """CPUs of the cluster as it is now, at least 1."""
        return max(1, sum(room.cpus for room in ray_cluster.rooms()))

    def submit(self, task: Task) -> None:
        """Start the task as soon as a node has room; one that no node can ever hold fails at the next `wait`."""
        train_apart = self._run_rank is not None and task.workers > 1 and task.kind in _TRAINING_KINDS
        problem = ray_cluster.problem_of(task, task.workers if train_apart else 1, ray_cluster.rooms())
        if problem:
            self._refused.append((task.id, _failure(task, problem, "input")))
            return
        self._attempts[task.id] += 1
        request = {
            "task": to_json(task),
            "ledger_uri": self._ledger_uri,
            "attempts": self._attempts[task.id],
            "variables": self._variables,
            "train_apart": train_apart,
        }
        function = self._run_rank if train_apart else self._run_step
        name = f"{task.kind} {task.model}"
        if train_apart:
            reference = _train_remote.options(name=name).remote(request, function)
        else:
            reference = _run_remote.options(name=name, memory=task.memory_bytes or None).remote(
                request, function
            )
        self._in_flight[reference] = task

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskRecord | Failure]]:
        """Ends of tasks: every one that is there once there is one; none after `timeout_seconds`."""
        ends: list[tuple[str, TaskRecord | Failure]] = list(self._refused)
        self._refused.clear()
        references = list(self._in_flight)
        if not references:
            return ends
        ray.wait(references, num_returns=1, timeout=0 if ends else timeout_seconds)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            task = self._in_flight.pop(reference)
            ends.append((task.id, _end(task, reference)))
        return ends

    def close(self) -> None:
        """Cancel what runs; end the cluster if it was started here."""
        for reference in self._in_flight:
            ray.cancel(reference, force=True)
        self._in_flight.clear()
        if self._owns_cluster:
            ray.shutdown()


def _end(task: Task, reference: ray.ObjectRef[dict[str, Any]]) -> TaskRecord | Failure:
    try:
        answer = ray.get(reference)
    except ray.exceptions.RayError as error:
        error_class, what = next((row[1], row[2]) for row in _RAY_ERRORS if isinstance(error, row[0]))
        details = str(error) if error_class == "bug" else ""
        return _failure(task, f"{task.kind} did not end: {what}", error_class, details)
    return failure_from_json(answer["failure"]) if "failure" in answer else record_from_json(answer["record"])


def _failure(task: Task, reason: str, error_class: ErrorClass, details: str = "") -> Failure:
    return Failure(task=task.id, model=task.model, reason=reason, error_class=error_class, details=details)


def _run(request: Mapping[str, Any], function: Any) -> dict[str, Any]:
    """What a Ray worker does: `function` is a RunStep, or a RunRank when the training has workers of its own."""
    task, variables = task_from_json(request["task"]), request["variables"]
    if variables is not None:
        ray_cluster.adopt_aws_variables(variables)
    if request["train_apart"]:
        from .ray_train import run_on_workers

        function = partial(run_on_workers, run_rank=function, workers=task.workers, variables=variables)
    end = execute(task, function, request["ledger_uri"], attempts=request["attempts"])
    return {"failure" if isinstance(end, Failure) else "record": to_json(end)}


_run_remote = ray.remote(num_cpus=1, max_retries=0)(_run)
# The process that starts training workers only waits for them, so it holds no CPU; and it ends with its task,
# because Ray Train's controller would otherwise live on for as long as it does.
_train_remote = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(_run)
