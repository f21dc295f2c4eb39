"""Drive a fleet: resolve, plan, let the scheduler and an executor do the tasks, and write down what came out."""

import json
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fleetpress.compression.errors import CompressionError
from fleetpress.storage.artifact import LATEST, artifact_key, manifest_exists, point_latest
from fleetpress.storage.checkpoint import open_checkpoint
from fleetpress.storage.errors import UNUSABLE_STORE, ArtifactCorrupt, ObjectNotFound, StorageError
from fleetpress.storage.store import ObjectStore, open_store

from .errors import FleetpressError
from .executors import Executor, ExecutorName, open_executor
from .fleet import Fleet, Model, absolute, resolve
from .ledger import Ledger
from .plan import ModelPlan, artifact_digest, plan_checkpoint, plan_program
from .results import EVENTS, REPORT, RUNS, FleetResult, ModelResult, layers_of, write_summary
from .scheduler import Scheduler
from .shared_work import SharedWork
from .spec import Spec
from .spec_checks import needs_gradients
from .steps import run_rank, run_step
from .tasks import Failure, Task, TaskRecord

_WAIT_SECONDS = 1.0
_USED_UP = ("open", "convert")  # kinds whose results later tasks do not read again
_LOOK_UPS = 16  # records that are read at a time
_SUMMARY_SECONDS = 2.0  # how often a running summary is refreshed at most

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened: a task started, ended, failed or is tried again, or a model reached a state."""

    kind: str
    model: str
    task: str | None = None
    text: str = ""
    seconds: float | None = None


Listener = Callable[[Event, FleetResult], None]


def run_fleet(
    spec: Spec,
    *,
    executor: ExecutorName = "ray",
    address: str | None = None,
    allow_code: bool = False,
    listener: Listener | None = None,
) -> FleetResult:
    """Compress every model of the spec and publish what passes validation. Running it again is the resume.

    One bad model never stops the others; its state says why. Raises SpecError, StorageError when the output cannot be
    used, and ClusterUnreachable. KeyboardInterrupt ends the run in a consistent state and comes back as a result.
    """
    return _Run(spec, executor, address, allow_code, listener).drive()


class _Run:
    def __init__(
        self,
        spec: Spec,
        executor: ExecutorName,
        address: str | None,
        allow_code: bool,
        listener: Listener | None,
    ) -> None:
        self.spec = spec
        self.output = absolute(spec.output)
        self.store: ObjectStore = open_store(self.output)
        self.run = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + secrets.token_hex(3)
        self._executor_name = executor
        self._address = address
        self._allow_code = allow_code
        self._listener = listener
        self._models: dict[str, ModelResult] = {}
        self._events: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._summarized = 0.0

    def drive(self) -> FleetResult:
        """The whole run."""
        self._summarize("running")
        try:
            fleet = resolve(self.spec, allow_code=self._allow_code)
            self._begin(fleet)
            plans = [plan for plan in map(self._plan, fleet.models) if plan is not None]
            self._summarize("running")
            if plans:
                self._work(plans)
        except KeyboardInterrupt:
            return self._finish("interrupted")
        except (StorageError, FleetpressError):
            with suppress(StorageError):  # what ended the run is told, not what follows from it
                self._finish("interrupted")
            raise
        return self._finish("done")

    def result(self, state: str = "running") -> FleetResult:
        """The run as it stands."""
        return FleetResult(
            run=self.run,
            state=state,  # type: ignore[arg-type]
            name=self.spec.name,
            output=self.spec.output,
            models=tuple(self._models.values()),
            seconds=round(time.monotonic() - self._started, 3),
        )

    def _begin(self, fleet: Fleet) -> None:
        for model in fleet.models:
            self._models[model.name] = ModelResult(name=model.name, state="pending")
        for problem in fleet.problems:
            self._set(
                ModelResult(
                    name=problem.model,
                    state="failed",
                    reason=problem.reason,
                    unreachable=problem.unreachable,
                )
            )

    def _plan(self, model: Model) -> ModelPlan | None:
        """The model's tasks; None when it is published already, or cannot be planned."""
        try:
            digest = artifact_digest(model, seed=self.spec.seed, workers=self.spec.resources.workers)
            if manifest_exists(self.store, model.name, digest):
                self._set(self._unchanged(model, digest))
                return None
            return plan_model(model, self.spec, self.run)
        except (StorageError, FleetpressError, CompressionError) as error:
            unreachable = isinstance(error, UNUSABLE_STORE)
            self._set(
                ModelResult(name=model.name, state="failed", reason=str(error), unreachable=unreachable)
            )
            return None

    def _unchanged(self, model: Model, digest: str) -> ModelResult:
        """A published artifact, with its numbers; the pointer is mended if it shows another one."""
        key = artifact_key(model.name, digest, "metrics.json")
        try:
            found = _measured(model.name, "unchanged", digest, json.loads(self.store.get(key)))
        except (ValueError, LookupError, TypeError):
            folder = f"{self.store.uri}/models/{model.name}/{digest}"
            raise ArtifactCorrupt(
                f"{self.store.uri}/{key} is damaged; delete {folder} and run again"
            ) from None
        try:
            current = json.loads(self.store.get(f"models/{model.name}/{LATEST}"))["digest"]
        except (ObjectNotFound, ValueError, LookupError, TypeError):
            current = None
        if current != digest:
            point_latest(self.store, model.name, digest, self.run)
        return found

    def _work(self, plans: list[ModelPlan]) -> None:
        tasks = [task for plan in plans for task in plan.tasks]
        ledger = Ledger(self.store)
        known = ledger.known()
        recorded = [task for task in tasks if task.digest in known]
        with ThreadPoolExecutor(_LOOK_UPS) as pool:
            found = dict(
                zip(
                    (t.id for t in recorded), pool.map(ledger.find, (t.digest for t in recorded)), strict=True
                )
            )
        done = {task_id: record for task_id, record in found.items() if record is not None}
        # A published record whose manifest is gone (deleted by hand) is no proof: that task runs again. So does the
        # one of a model whose twin of another name was published.
        finals = {plan.tasks[-1].id: plan.model.name for plan in plans}
        stale = {
            task_id for task_id in done.keys() & finals.keys() if done[task_id].result["state"] == "published"
        }
        for task_id, model in finals.items():
            if task_id in done.keys() - stale:
                self._publish_state(model, done[task_id])
        scheduler = Scheduler(tasks, done=with_unneeded(tasks, done.keys() - stale))
        if scheduler.is_over:
            return
        executor = open_executor(
            self._executor_name,
            run_step,
            self.output,
            run_rank=run_rank,
            address=self._address,
            memory_bytes=self.spec.resources.memory_per_task_bytes,
        )
        try:
            self._loop(scheduler, executor)
        finally:
            executor.close()

    def _loop(self, scheduler: Scheduler, executor: Executor) -> None:
        work = SharedWork()
        while not scheduler.is_over:
            while tasks := scheduler.ready(executor.slots - len(scheduler.running) + work.waiting):
                for task in tasks:
                    self._set(replace(self._models[task.model], state="running"), quiet=True)
                    self._tell(Event(kind="started", model=task.model, task=task.id))
                    record = work.begin(task)
                    if record is not None:
                        self._ended(scheduler, task, record)
                    elif work.is_first(task):
                        executor.submit(task)
            for task_id, end in executor.wait(_WAIT_SECONDS):
                for task, its_end in work.ended(task_id, end):
                    self._ended(scheduler, task, its_end)

    def _ended(self, scheduler: Scheduler, task: Task, end: TaskRecord | Failure) -> None:
        if isinstance(end, TaskRecord):
            scheduler.finished(task.id)
            self._tell(Event(kind="finished", model=task.model, task=task.id, seconds=end.seconds))
            self._publish_state(task.model, end)
            return
        if end.details:
            _log.error("%s: %s\n%s", task.id, end.reason, end.details)
        what = scheduler.failed(task.id, end)
        self._tell(Event(kind=what, model=task.model, task=task.id, text=end.reason))
        if what == "give_up" and self._models[task.model].state != "failed":
            unreachable = end.error_class == "transient"
            self._set(
                ModelResult(name=task.model, state="failed", reason=end.reason, unreachable=unreachable)
            )

    def _publish_state(self, model: str, record: TaskRecord) -> None:
        """The last task of a model says what became of it."""
        state = record.result.get("state")
        if state in ("published", "rejected"):
            digest = record.digest if state == "published" else None
            self._set(_measured(model, state, digest, record.result["metrics"], record.result["reason"]))

    def _set(self, model: ModelResult, *, quiet: bool = False) -> None:
        self._models[model.name] = model
        if not quiet:
            self._tell(Event(kind=model.state, model=model.name, text=model.reason or ""))
        if time.monotonic() - self._summarized > _SUMMARY_SECONDS:
            self._summarize("running")

    def _tell(self, event: Event) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        self._events.append(
            {"at_seconds": seconds, **{k: v for k, v in vars(event).items() if v not in (None, "")}}
        )
        if self._listener is not None:
            self._listener(event, self.result())

    def _summarize(self, state: str) -> None:
        self._summarized = time.monotonic()
        write_summary(self.store, self.result(state))

    def _finish(self, state: str) -> FleetResult:
        from .report import render_html

        result = self.result(state)
        lines = "".join(json.dumps(event, sort_keys=True) + "\n" for event in self._events)
        self.store.put(f"{RUNS}{self.run}/{EVENTS}", lines.encode())
        self.store.put(
            f"{RUNS}{self.run}/{REPORT}", render_html(result, layers_of(self.store, result)).encode()
        )
        write_summary(self.store, result)
        return result


def plan_model(model: Model, spec: Spec, run: str) -> ModelPlan:
    """The tasks of one model. Reads the headers of a checkpoint and nothing of a program."""
    shared: dict[str, Any] = {"output": absolute(spec.output), "run": run, "seed": spec.seed}
    memory = spec.resources.memory_per_task_bytes
    if model.source.kind == "checkpoint":
        return plan_checkpoint(model, open_checkpoint(model.source.uri), memory_bytes=memory, **shared)
    step = model.recipe.prune
    gradients = step is not None and needs_gradients(step)
    return plan_program(
        model, workers=spec.resources.workers, memory_bytes=memory, gradients=gradients, **shared
    )


def with_unneeded(tasks: Sequence[Task], done: Collection[str]) -> set[str]:
    """`done` and the tasks that nobody needs any more: what they made is within a finished shard."""
    users: dict[str, list[str]] = {}
    for task in tasks:
        for need in task.needs:
            users.setdefault(need, []).append(task.id)
    over = set(done)
    for task in reversed(tasks):
        if task.kind in _USED_UP and all(user in over for user in users[task.id]):
            over.add(task.id)
    return over


def _measured(
    name: str, state: str, digest: str | None, metrics: Mapping[str, Any], reason: str | None = None
) -> ModelResult:
    return ModelResult(
        name=name,
        state=state,  # type: ignore[arg-type]
        reason=reason,
        digest=digest,
        before=metrics["before"],
        after=metrics["after"],
        compression_ratio=metrics["compression_ratio"],
        bits_per_weight=metrics["bits_per_weight"],
    )
