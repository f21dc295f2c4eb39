"""The loop of a run: the scheduler says what may start, the executor does it, leases say whose it is."""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from fleetpress.storage.artifact import manifest_exists

from ..executors import Executor
from ..ledger import Ledger
from ..planning.plan import ModelPlan
from ..runs.events import Event
from ..runs.results import ModelResult, measured_result
from ..tasks import (
    Failure,
    Task,
    TaskRecord,
)
from ..threads import side_by_side
from .journal import Journal
from .leases import Lease, Leases
from .scheduler import Scheduler
from .shared_work import SharedWork
from .stop import Stop

_WAIT_SECONDS = 1.0
_ASK_AGAIN_SECONDS = 3.0  # for a model that another run works on
# Kinds whose results nobody reads again once those who need them are done.
_USED_UP = ("advance", "solve", "open", "convert")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The lease of a model, None if another run has it; `is_alone` if no other run has done anything of it."""

    lease: Lease | None
    is_alone: bool


class Work:
    """The tasks of all models that are to be done. `leases` None: the store cannot say who works on what."""

    def __init__(
        self, plans: Sequence[ModelPlan], ledger: Ledger, leases: Leases | None, journal: Journal, stop: Stop
    ) -> None:
        self._plans = {plan.model.name: plan for plan in plans}
        self._ledger = ledger
        self._leases = leases
        self._journal = journal
        self._stop = stop
        self._shared = SharedWork()
        self._refused: dict[str, float] = {}  # models of other runs, and when to ask again
        self._caught_up: dict[str, Lease] = {}  # models whose records were looked for, and under which lease
        self._answers: dict[str, _Answer] = {}  # by digest: to what was asked last
        self._settled: list[str] = []  # digests whose lease is to be given back
        self._theirs: set[str] = set()  # tasks that other runs have done since this one began
        tasks = [task for plan in plans for task in plan.tasks]
        self._scheduler = Scheduler(tasks, done=self._done_before(tasks))
        journal.progress.tasks, journal.progress.left = len(tasks), self._scheduler.left

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self._scheduler.is_over

    def run(self, executor: Executor) -> None:
        """Until every task has ended or was given up. Raises KeyboardInterrupt when the run is to end."""
        try:
            while not self._scheduler.is_over:
                self._start(executor)
                if self._stop.wanted:
                    raise KeyboardInterrupt
                if self._scheduler.running_count == 0:
                    self._idle()
                for task_id, end in executor.wait(_WAIT_SECONDS):
                    for task, its_end in self._shared.ended(task_id, end):
                        self._ended(task, its_end)
                self._release()
        finally:
            if self._leases is not None:
                self._leases.release_all()

    def _done_before(self, tasks: Sequence[Task]) -> set[str]:
        """Tasks with a record that holds. Models whose last task is among them are over."""
        done = self._ledger.find_all(tasks)
        for plan in self._plans.values():
            self._last(plan, done)
        return with_unneeded(tasks, done)

    def _last(self, plan: ModelPlan, found: dict[str, TaskRecord]) -> None:
        """Say what became of a model whose last task is among the found; if that is no proof, it is so no more.

        No proof is the record of a published artifact whose manifest is gone (deleted by hand), and the one of its
        twin of another name.
        """
        last = found.get(plan.tasks[-1].id)
        if last is None:
            return
        name = plan.model.name
        if "state" not in last.result:  # the plan ends with a search, what comes of it is decided elsewhere
            return
        if last.result["state"] == "published" and not manifest_exists(self._ledger.store, name, plan.digest):
            del found[plan.tasks[-1].id]
        else:
            self._publish_state(name, last)

    def _start(self, executor: Executor) -> None:
        scheduler = self._scheduler
        while tasks := scheduler.ready(
            executor.slots - scheduler.running_count + self._shared.waiting, time.monotonic()
        ):
            self._ask(tasks)
            for task in tasks:
                if not self._is_ours(task):
                    continue
                self._journal.set(replace(self._state_of(task.model), state="running"), quiet=True)
                self._journal.tell(Event(kind="started", model=task.model, task=task.id, step=task.kind))
                record = self._shared.begin(task)
                if record is not None:
                    self._ended(task, record)
                elif self._shared.is_first(task):
                    executor.submit(task)

    def _idle(self) -> None:
        """Everything that could run waits for its time."""
        at = self._scheduler.next_at
        if at is not None:
            time.sleep(min(_WAIT_SECONDS, max(0.0, at - time.monotonic())))

    def _ask(self, tasks: Sequence[Task]) -> None:
        """Ask for the leases of models that are begun, all at once: one by one takes longer than small models do."""
        if self._leases is None:
            return
        now, begun = time.monotonic(), dict[str, Task]()
        for task in tasks:
            digest = self._plans[task.model].digest
            if self._refused.get(task.model, 0.0) <= now and not self._leases.holds(digest):
                begun.setdefault(digest, task)
        self._answers.update(zip(begun, side_by_side(self._answer, begun.values()), strict=True))

    def _answer(self, task: Task) -> _Answer:
        assert self._leases is not None
        lease = self._leases.take(self._plans[task.model].digest)
        # A lease that was given back leaves no trace, so the first one is no proof that nobody was there. Whoever was
        # has done the model's first task: one look for its record tells.
        is_alone = lease is not None and lease.is_first and self._ledger.read(task.digest) is None
        return _Answer(lease=lease, is_alone=is_alone)

    def _is_ours(self, task: Task) -> bool:
        """Whether this run works on the task's model; if not, the task waits, or has been done by now."""
        if self._leases is None:
            return True
        digest, now = self._plans[task.model].digest, time.monotonic()
        if self._refused.get(task.model, 0.0) > now:
            self._scheduler.postponed(task.id, self._refused[task.model])
            return False
        if task.digest == digest:
            self._leases.check(digest)
        answer = self._answers.get(digest)
        if answer is None or (answer.lease is not None and not self._leases.holds(digest)):  # just overtaken
            answer = self._answers[digest] = self._answer(task)
        if answer.lease is None:
            del self._answers[digest]
            if task.model not in self._refused:
                self._journal.tell(
                    Event(kind="waiting", model=task.model, text="another run works on this model")
                )
            self._refused[task.model] = now + _ASK_AGAIN_SECONDS
            self._scheduler.postponed(task.id, self._refused[task.model])
            return False
        if self._caught_up.get(task.model) is not answer.lease:
            self._caught_up[task.model] = answer.lease
            if not answer.is_alone:
                self._catch_up(task.model)
        if task.id not in self._theirs:
            return True
        self._theirs.discard(task.id)
        self._scheduler.finished(task.id)
        self._settle(task.model)
        return False

    def _catch_up(self, model: str) -> None:
        """Take over what other runs have done of a model since the ledger was listed."""
        plan = self._plans[model]
        found = self._ledger.find_all(plan.tasks, again=True)
        self._last(plan, found)
        over = with_unneeded(plan.tasks, found)
        self._theirs.update(over)
        self._scheduler.found(over)

    def _ended(self, task: Task, end: TaskRecord | Failure) -> None:
        if isinstance(end, TaskRecord):
            self._scheduler.finished(task.id)
            self._journal.tell(_end_event("finished", task, end))
            self._publish_state(task.model, end)
            self._settle(task.model)
            return
        if end.details:
            _log.error("%s: %s\n%s", task.id, end.reason, end.details)
        what = self._scheduler.failed(task.id, end, time.monotonic())
        self._journal.tell(_end_event(what, task, end))
        if what == "give_up" and self._state_of(task.model).state != "failed":
            tries = self._scheduler.attempts(task.id)
            reason = end.reason if tries == 1 else f"{end.reason} (tried {tries} times)"
            unreachable = end.error_class in ("transient", "lost")
            self._journal.set(
                ModelResult(name=task.model, state="failed", reason=reason, unreachable=unreachable)
            )
            self._settle(task.model)

    def _publish_state(self, model: str, record: TaskRecord) -> None:
        """The last task of a model says what became of it."""
        state = record.result.get("state")
        if state in ("published", "rejected"):
            digest = record.digest if state == "published" else None
            result = record.result
            self._journal.set(measured_result(model, state, digest, result["metrics"], result["reason"]))

    def _settle(self, model: str) -> None:
        """A model's lease is given back once nothing will be done to it any more."""
        if self._state_of(model).state not in ("pending", "running"):
            self._settled.append(self._plans[model].digest)

    def _release(self) -> None:
        settled, self._settled = self._settled, []
        for digest in settled:
            self._answers.pop(digest, None)
        if self._leases is not None:
            side_by_side(self._leases.release, settled)

    def _state_of(self, model: str) -> ModelResult:
        return self._journal.progress.models[model]


def _end_event(kind: str, task: Task, end: TaskRecord | Failure) -> Event:
    return Event(
        kind=kind,
        model=task.model,
        task=task.id,
        step=task.kind,
        seconds=round(end.seconds, 6),
        where=end.where,
        bytes_read=end.bytes_read,
        bytes_written=end.bytes_written,
        text=end.reason if isinstance(end, Failure) else "",
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
