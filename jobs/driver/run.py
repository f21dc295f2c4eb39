"""Drive a fleet: resolve, plan, let the scheduler and an executor do the tasks, and write down what came out."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fleetpress.compression.errors import CompressionError
from fleetpress.storage.checkpoint import open_checkpoint
from fleetpress.storage.errors import UNUSABLE_STORE, StorageError
from fleetpress.storage.store import ObjectStore, open_store

from ..digests import digest
from ..errors import FleetpressError, UsageError
from ..executors import (
    ExecutorName,
    open_executor,
    open_metrics,
)
from ..executors.address import check_address, given_address
from ..ledger import Ledger
from ..planning.fleet import (
    Fleet,
    Model,
    absolute,
    resolve,
)
from ..planning.plan import (
    ModelPlan,
    artifact_digest,
    plan_checkpoint,
    plan_program,
    without_end,
)
from ..runs.events import Event
from ..runs.heartbeat import Heartbeat
from ..runs.past_runs import rows_of
from ..runs.progress import Listener
from ..runs.published import find_published, unchanged
from ..runs.results import (
    GOOD,
    FleetResult,
    ModelResult,
    summary_key,
)
from ..spec.checks import needs_gradients, needs_inputs
from ..spec.fleet_spec import Spec
from ..steps import run_rank, run_step
from ..threads import side_by_side
from .job_records import JobRecord, write_job
from .journal import Journal
from .leases import Leases
from .stop import Stop
from .work import Work

__all__ = ["Event", "Listener", "plan_model", "run_fleet"]


def run_fleet(
    spec: Spec,
    *,
    executor: ExecutorName = "ray",
    address: str | None = None,
    allow_code: bool = False,
    listener: Listener | None = None,
    job: JobRecord | None = None,
) -> FleetResult:
    """Compress every model of the spec and publish what passes validation. Running it again is the resume.

    One bad model never stops the others; its state says why. Several runs of one output at the same time share the
    work. Raises UsageError, StorageError when the output cannot be used, and ClusterUnreachable. KeyboardInterrupt,
    SIGTERM and `cancel` end the run in a consistent state and come back as a result. `job` is the job of a cluster that
    this run is; the output keeps which run it became.
    """
    return _Run(spec, executor, address, allow_code, listener=listener, job=job).drive()


class _Run:
    def __init__(
        self,
        spec: Spec,
        executor: ExecutorName,
        address: str | None,
        allow_code: bool,
        *,
        listener: Listener | None,
        job: JobRecord | None,
    ) -> None:
        if executor == "ray":  # before anything is written
            check_address(given_address(address))
        elif address:
            raise UsageError(
                f"executor inline works in this process, not on the cluster at {address}: leave one of the two out"
            )
        self.spec = spec
        self.output = absolute(spec.output)
        self.store: ObjectStore = open_store(self.output)
        self.run = new_run_id(time.time())
        self.journal = Journal(
            self.store, self.run, spec, listener, executor=executor, job=job.job if job else None
        )
        self._job = job
        self._executor_name = executor
        self._address = address
        self._allow_code = allow_code
        self._fleet: str | None = None  # names what models with a common budget share

    def drive(self) -> FleetResult:
        """The whole run."""
        try:
            with Stop() as stop:
                self.journal.begin()
                if self._job is not None:
                    write_job(self.store, replace(self._job, run=self.run))
                with Heartbeat(self.store, self.run, stop.now) as heartbeat:
                    self._models(heartbeat, stop)
        except KeyboardInterrupt:
            return self.journal.finish("interrupted")
        except (StorageError, FleetpressError):
            self.journal.abandon()
            raise
        return self.journal.finish("done")

    def _models(self, heartbeat: Heartbeat, stop: Stop) -> None:
        fleet = resolve(self.spec, allow_code=self._allow_code)
        self._begin(fleet)
        plans = self._plans(fleet.models, rows_of(self.journal.look_back()))
        if not plans:
            return
        ledger, leases = Ledger(self.store), self._leases(heartbeat)
        shares = self.spec.fleet is not None and any(plan.model.recipe.auto for plan in plans)
        first = [without_end(plan) if shares and plan.model.recipe.auto else plan for plan in plans]
        work = Work(first, ledger, leases, self.journal, stop)
        if work.is_over and not shares:
            return
        executor = open_executor(
            self._executor_name,
            run_step,
            self.output,
            run_rank=run_rank,
            address=self._address,
            mark=summary_key(self.run),
            memory_bytes=self.spec.resources.memory_per_task_bytes,
            task_seconds=self.spec.resources.time_per_task_seconds,
            gpus=max(task.gpus for plan in plans for task in plan.tasks),
        )
        metrics = open_metrics(self._executor_name, self.spec.name)
        if metrics is not None:
            self.journal.listen(metrics)
        stop.arm()
        try:
            work.run(executor)
            if shares and (rest := self._shared([plan for plan in plans if plan.model.recipe.auto], fleet)):
                Work(rest, ledger, leases, self.journal, stop).run(executor)
        finally:
            executor.close()

    def _shared(self, plans: Sequence[ModelPlan], fleet: Fleet) -> list[ModelPlan]:
        """What is left to do of models that share a budget, once all of them were searched: to publish what is theirs.

        One whose search failed has failed already, and is left out of the budget; one that is published is in it.
        """
        from ..auto.budget import Budget, shared_plans

        assert self.spec.fleet is not None
        states = {name: model.state for name, model in self.journal.progress.models.items()}
        others = (model for model in fleet.models if model.recipe.auto and states[model.name] in GOOD)
        there = [plan for plan in map(self._plan, others) if isinstance(plan, ModelPlan)]
        left = [plan for plan in plans if states[plan.model.name] != "failed"]
        try:
            return shared_plans(left, there, self.store, Budget(**self.spec.fleet.model_dump()))
        except FleetpressError as error:
            for plan in left:
                self._fail(plan.model.name, str(error), unreachable=False)
            return []

    def _begin(self, fleet: Fleet) -> None:
        self.journal.accept({model.name: model.recipe.validation.max_drop for model in fleet.models})
        for model in fleet.models:
            self.journal.set(ModelResult(name=model.name, state="pending"), quiet=True)
        for problem in fleet.problems:
            self._fail(problem.model, problem.reason, unreachable=problem.unreachable)

    def _plans(self, models: tuple[Model, ...], known: Mapping[str, ModelResult]) -> list[ModelPlan]:
        """The tasks of every model that is not published yet; those that cannot be planned fail here."""
        digests = digests_of(models, self.spec)
        self._fleet = fleet_of(models, self.spec)
        there = find_published(self.store, digests)
        ours = {name: digests[name] for name in digests if name in there}
        for name, found in unchanged(self.store, ours, self.run, known):
            if isinstance(found, ModelResult):
                self.journal.set(found)
            else:
                self._fail(name, str(found), unreachable=isinstance(found, UNUSABLE_STORE))
        plans = []
        for plan in side_by_side(self._plan, [model for model in models if model.name not in there]):
            if isinstance(plan, ModelPlan):
                plans.append(plan)
            else:
                self._fail(plan[0], str(plan[1]), unreachable=isinstance(plan[1], UNUSABLE_STORE))
        return plans

    def _plan(self, model: Model) -> ModelPlan | tuple[str, Exception]:
        try:
            return plan_model(model, self.spec, self.run, fleet=self._fleet)
        except (StorageError, FleetpressError, CompressionError) as error:
            return model.name, error

    def _fail(self, model: str, reason: str, *, unreachable: bool) -> None:
        self.journal.set(ModelResult(name=model, state="failed", reason=reason, unreachable=unreachable))

    def _leases(self, heartbeat: Heartbeat) -> Leases | None:
        """Leases, if the store was seen to honour conditions; without them two runs at once only do work twice."""
        probe = self.store.probe()
        if probe.conditional_writes:
            return Leases(self.store, self.run, heartbeat)
        self.journal.warn(
            f"{probe.problem}; the results stay right, but two runs at once would both do all the work"
        )
        return None


def new_run_id(now: float) -> str:
    """The time to the millisecond, so that ids sort as runs began, and three random bytes."""
    seconds, milliseconds = divmod(int(now * 1000), 1000)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}{milliseconds:03}Z-{secrets.token_hex(3)}"


def digests_of(models: Sequence[Model], spec: Spec) -> dict[str, str]:
    """Names of the artifacts that the spec makes of its models."""
    fleet = fleet_of(models, spec)
    return {model.name: _digest_of(model, spec, fleet) for model in models}


def _digest_of(model: Model, spec: Spec, fleet: str | None = None) -> str:
    resources = spec.resources
    return artifact_digest(
        model, seed=spec.seed, workers=resources.workers, gpus=resources.gpus_per_task, fleet=fleet
    )


def fleet_of(models: Sequence[Model], spec: Spec) -> str | None:
    """Names what models with `auto` share: the budget, and who else is in it. None without a budget."""
    if spec.fleet is None:
        return None
    together = sorted(_digest_of(model, spec) for model in models if model.recipe.auto is not None)
    return digest("fleet", budget=spec.fleet.model_dump(mode="json"), models=together)


def plan_model(model: Model, spec: Spec, run: str, *, fleet: str | None = None) -> ModelPlan:
    """The tasks of one model. Reads the headers of a checkpoint and nothing of a program. `fleet` as of `fleet_of`."""
    shared: dict[str, Any] = {"output": absolute(spec.output), "run": run, "seed": spec.seed}
    memory = spec.resources.memory_per_task_bytes
    if model.source.kind == "checkpoint":
        return plan_checkpoint(model, open_checkpoint(model.source.uri), memory_bytes=memory, **shared)
    prune, quantize = model.recipe.prune, model.recipe.quantize
    return plan_program(
        model,
        workers=spec.resources.workers,
        memory_bytes=memory,
        gradients=prune is not None and needs_gradients(prune),
        inputs=quantize is not None and needs_inputs(quantize),
        gpus=spec.resources.gpus_per_task,
        fleet=fleet,
        **shared,
    )
