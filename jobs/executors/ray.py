"""Runs tasks on a Ray cluster: one CPU a task, small messages only, retries left to the scheduler.

Credentials. On a cluster whose nodes are all this machine, tasks get this process' AWS_* variables as they are
now. They are never sent to another machine: there, each node brings its own (an instance role, a mounted
profile, the variables of its pod).

Nothing is waited for without an end. Ray itself would wait for ever for a node that was cut off, or for room that no
node has any more; so a task first says where it runs, and the driver looks after nodes, deadlines and the head.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import ray

from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import is_s3

from ..errors import ModelError, UsageError
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
from . import TASK_SECONDS, ray_cluster

_TRAINING_KINDS = ("train", "finetune")

# What Ray says in place of the step; the first class that fits decides.
_RAY_ERRORS: tuple[tuple[type[BaseException], ErrorClass, str], ...] = (
    (ray.exceptions.OutOfMemoryError, "memory", "its worker was ended because the node ran out of memory"),
    (ray.exceptions.WorkerCrashedError, "transient", "its worker process died"),
    (ray.exceptions.NodeDiedError, "lost", "its node died"),
    (ray.exceptions.RayTaskError, "bug", "the worker could not start it"),
    (ray.exceptions.RayError, "transient", "Ray lost it"),
)


_LOOK_SECONDS = 1.0  # how often nodes and deadlines are looked after
_GRACE_SECONDS = 120.0  # for a node to come that has room: an autoscaler may be about to bring one
_SILENCE_SECONDS = 30.0  # for a task to say where it runs, when there is room and a node was lost meanwhile


@dataclass
class _Flight:
    """A task on its way. `node` is where it runs, once it has said so; `losses` are those of nodes before it."""

    task: Task
    workers: int
    losses: int
    since: float
    node: str = ""
    where: str = ""  # the same for people
    silent_since: float | None = None
    hopeless_since: float | None = None


class RayExecutor:
    """Tasks as Ray tasks. Raises ClusterUnreachable when there is no cluster to join, or none any more, and UsageError
    when tasks are to ask for `gpus` that no node has.

    A task is given up as transient when its node is lost or it takes longer than `task_seconds`, and for good when no
    node has had room for it for `grace_seconds`. A cluster without any CPU for as long counts as gone.
    """

    def __init__(
        self,
        run_step: RunStep,
        ledger_uri: str,
        *,
        run_rank: RunRank | None = None,
        address: str | None = None,
        mark: str = "",
        task_seconds: float = TASK_SECONDS,
        grace_seconds: float = _GRACE_SECONDS,
        gpus: float = 0.0,
    ) -> None:
        self._owns_cluster = ray_cluster.connect(address)
        if gpus:
            self._check_gpus(gpus)
        self._run_step = run_step
        self._run_rank = run_rank
        self._ledger_uri = ledger_uri
        self._mark = mark
        self._variables = ray_cluster.aws_variables() if ray_cluster.is_on_this_machine() else None
        self._task_seconds = task_seconds
        self._grace_seconds = grace_seconds
        self._lookout = ray_cluster.Lookout()
        self._looked = 0.0
        self._attempts: Counter[str] = Counter()
        self._in_flight: dict[Any, _Flight] = {}
        self._refused: list[tuple[str, Failure]] = []

    def _check_gpus(self, gpus: float) -> None:
        problem = ray_cluster.gpu_problem(gpus, ray_cluster.rooms())
        if problem:
            if self._owns_cluster:
                ray.shutdown()
            raise UsageError(problem)

    @property
    def slots(self) -> int:
        """CPUs of the cluster as it was a moment ago, at least 1."""
        self._lookout.check(self._grace_seconds)
        return max(1, sum(room.cpus for room in self._lookout.rooms()))

    def submit(self, task: Task) -> None:
        """Start the task as soon as a node has room; one that no node ever had room for fails at the next `wait`."""
        self._lookout.check(self._grace_seconds)
        train_apart = self._run_rank is not None and task.workers > 1 and task.kind in _TRAINING_KINDS
        workers = task.workers if train_apart else 1
        problem = ray_cluster.problem_of(task, workers, self._lookout.all_rooms())
        if problem:
            self._refused.append((task.id, _failure(task, problem, "input")))
            return
        self._attempts[task.id] += 1
        request = {
            "task": to_json(task),
            "ledger_uri": self._ledger_uri,
            "mark": self._mark,
            "attempts": self._attempts[task.id],
            "variables": self._variables,
            "train_apart": train_apart,
            # Packed, so that the worker says where it is before it loads the modules of the function.
            "function": _pack(self._run_rank if train_apart else self._run_step),
        }
        name = f"{task.kind} {task.model}"
        if train_apart:
            handle: Any = _train_remote.options(name=name).remote(request)
        else:
            handle = _run_remote.options(
                name=name, memory=task.memory_bytes or None, num_gpus=task.gpus or None
            ).remote(request)
        self._in_flight[handle] = _Flight(task, workers, self._lookout.losses, time.monotonic())

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskRecord | Failure]]:
        """Ends of tasks: every one that is there once there is one; none after `timeout_seconds`."""
        ends: list[tuple[str, TaskRecord | Failure]] = list(self._refused)
        self._refused.clear()
        deadline = time.monotonic() + timeout_seconds
        while self._in_flight and not ends:
            self._lookout.check(self._grace_seconds)
            left = max(0.0, deadline - time.monotonic())
            ends += self._news(min(_LOOK_SECONDS, left))
            ends += self._overdue()
            if not left:
                break
        return ends

    def close(self) -> None:
        """Cancel what runs; end the cluster if it was started here. A cluster that is gone is let go."""
        self._lookout.end()
        if not self._lookout.is_gone:
            for handle in self._in_flight:
                ray.cancel(handle, force=True)
            if self._owns_cluster:
                ray.shutdown()
        self._in_flight.clear()

    def _news(self, timeout_seconds: float) -> Iterator[tuple[str, TaskRecord | Failure]]:
        """What tasks have to say within the time: where they run, or how they ended; all that is there at once."""
        handles = list(self._in_flight)
        if not ray.wait(handles, num_returns=1, timeout=timeout_seconds, fetch_local=False)[0]:
            return
        ready, _ = ray.wait(handles, num_returns=len(handles), timeout=0, fetch_local=False)
        for handle in ready:
            flight = self._in_flight[handle]
            said = _said(flight.task, handle)
            if isinstance(said, tuple):
                flight.node, flight.where = said
                flight.since = time.monotonic()
            else:
                del self._in_flight[handle]
                yield flight.task.id, said if isinstance(said, TaskRecord) else _placed(said, flight)

    def _overdue(self) -> Iterator[tuple[str, TaskRecord | Failure]]:
        """Tasks that will not end by themselves, or not in time."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS or not self._in_flight:
            return
        self._looked = now
        nodes, rooms = self._lookout.node_ids(), self._lookout.rooms()
        for handle, flight in list(self._in_flight.items()):
            failure = self._lost(flight, nodes, now) or self._without_room(flight, rooms, now)
            if failure is not None:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(handle, force=True)
                del self._in_flight[handle]
                yield flight.task.id, _placed(failure, flight)

    def _lost(self, flight: _Flight, nodes: set[str], now: float) -> Failure | None:
        task = flight.task
        if flight.node and flight.node not in nodes:
            return _failure(task, f"{task.kind} did not end: its node was lost", "lost")
        if self._is_silent(flight, now):
            reason = f"{task.kind} did not begin: a node was lost, and it may have been there"
            return _failure(task, reason, "lost")
        if now - flight.since > self._task_seconds:
            where = "run" if flight.node else "begin"
            reason = (
                f"{task.kind} did not {where} within {self._task_seconds:g} seconds (resources.time_per_task)"
            )
            return _failure(task, reason, "transient")
        return None

    def _is_silent(self, flight: _Flight, now: float) -> bool:
        """Whether the task was on a node that was lost before word came where it runs."""
        may_be_lost = not flight.node and self._lookout.losses > flight.losses
        if not may_be_lost or not self._lookout.would_begin(flight.task):
            flight.silent_since = None
            return False
        flight.silent_since = flight.silent_since or now
        return now - flight.silent_since >= _SILENCE_SECONDS

    def _without_room(self, flight: _Flight, rooms: list[ray_cluster.Room], now: float) -> Failure | None:
        begun = flight.node and flight.workers == 1  # several workers begin only after the task itself
        problem = "" if begun else ray_cluster.problem_of(flight.task, flight.workers, rooms)
        if not problem:
            flight.hopeless_since = None
            return None
        if flight.hopeless_since is None:
            flight.hopeless_since = now
        if now - flight.hopeless_since < self._grace_seconds:
            return None
        return _failure(flight.task, problem, "input")


def _pack(function: Any) -> bytes:
    return bytes(ray.cloudpickle.dumps(function))  # type: ignore[no-untyped-call]


def _placed(end: Failure, flight: _Flight) -> Failure:
    """The end of a task that could not say itself where it ran, and for how long, because it is lost."""
    if end.where or not flight.where:
        return end
    return replace(end, where=flight.where, seconds=round(time.monotonic() - flight.since, 6))


def _said(task: Task, handle: Any) -> tuple[str, str] | TaskRecord | Failure:
    """The node that a task begins on, by id and for people, or its end."""
    try:
        answer = ray.get(next(handle))
    except StopIteration:
        return _failure(task, f"{task.kind} did not end: Ray lost it", "transient")
    except ray.exceptions.RayError as error:
        error_class, what = next((row[1], row[2]) for row in _RAY_ERRORS if isinstance(error, row[0]))
        details = str(error) if error_class == "bug" else ""
        return _failure(task, f"{task.kind} did not end: {what}", error_class, details)
    if "node" in answer:
        return str(answer["node"]), str(answer["where"])
    return failure_from_json(answer["failure"]) if "failure" in answer else record_from_json(answer["record"])


def _failure(task: Task, reason: str, error_class: ErrorClass, details: str = "") -> Failure:
    return Failure(task=task.id, model=task.model, reason=reason, error_class=error_class, details=details)


def _run(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a Ray worker does: the function is a RunStep, or a RunRank when the training has workers of its own."""
    node, where = ray_cluster.this_node()
    yield {"node": node, "where": where}
    function = ray.cloudpickle.loads(request["function"])
    task, variables = task_from_json(request["task"]), request["variables"]
    if variables is not None:
        ray_cluster.adopt_aws_variables(variables)
    where_seen = partial(_run_where_seen, request["ledger_uri"], request["mark"])
    if request["train_apart"]:
        from .ray_train import run_on_workers

        rank = partial(where_seen, function)  # ranks are on other nodes than this, which writes the record
        function = partial(run_on_workers, run_rank=rank, workers=task.workers, variables=variables)
    step = partial(where_seen, function)
    end = execute(task, step, request["ledger_uri"], attempts=request["attempts"], where=where)
    yield {"failure" if isinstance(end, Failure) else "record": to_json(end)}


def _run_where_seen(output: str, mark: str, function: Any, *arguments: Any) -> Any:
    """A step or a rank, on a node that sees the output of the driver: what is written to another one is lost."""
    if mark:
        _check_output(output, mark)
    return function(*arguments)


@cache  # one request a worker, and what raised is asked again
def _check_output(output: str, mark: str) -> None:
    try:
        open_store(output).head(mark)
    except ObjectNotFound:
        remedy = (
            "set AWS_ENDPOINT_URL on the nodes as it is there"
            if is_s3(output)
            else "give an output that every node sees, s3://bucket/prefix or a shared folder"
        )
        raise ModelError(
            f"node {ray_cluster.this_node()[1]} does not see the {output} of the machine that began the run: {remedy}"
        ) from None


_run_remote = ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")(_run)
# The process that starts training workers only waits for them, so it holds no CPU; and it ends with its task,
# because Ray Train's controller would otherwise live on for as long as it does.
_train_remote = ray.remote(num_cpus=0, max_retries=0, max_calls=1, num_returns="streaming")(_run)
