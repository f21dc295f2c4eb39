"""Which task may run next: a pure state machine, without a clock, a socket or a thread.

The driver asks `ready`, hands the tasks to an executor, and reports every end with `finished` or `failed`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from enum import Enum
from typing import Literal

from .tasks import Failure, Task

_MEMORY_ATTEMPTS = 2  # a second try runs in a fresher process; a third would only repeat the second


class _State(Enum):
    WAITING = "waiting"  # for a need
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    GIVEN_UP = "given up"


class Scheduler:
    """Runs every task after its needs, retries what may pass, and keeps one model's trouble to that model.

    `tasks` sets the order: models as they first appear, so that early ones finish early, and tasks as listed.
    `done` are ids of tasks whose records exist already. A task is started at most `max_attempts` times.
    When a task is given up, so is every task that needs it, and every task that only those would have used.
    """

    def __init__(self, tasks: Sequence[Task], done: Collection[str] = (), max_attempts: int = 3) -> None:
        assert max_attempts >= 1, max_attempts
        self._tasks = {task.id: task for task in tasks}
        assert len(self._tasks) == len(tasks), "two tasks have the same id"
        assert set(done) <= self._tasks.keys(), (
            f"done tasks are unknown: {sorted(set(done) - self._tasks.keys())}"
        )
        self._users = _users(self._tasks)
        self._rank = _ranks(tasks)
        self._max_attempts = max_attempts
        self._attempts = dict.fromkeys(self._tasks, 0)
        self._state = {name: _State.DONE if name in done else _State.WAITING for name in self._tasks}
        self._missing = {
            name: sum(self._state[need] is not _State.DONE for need in set(task.needs))
            for name, task in self._tasks.items()
        }
        self._queue: list[tuple[tuple[int, int], str]] = []
        self.given_up: dict[str, Failure] = {}
        for name in self._tasks:
            if self._missing[name] == 0 and self._state[name] is _State.WAITING:
                self._enqueue(name)

    @property
    def running(self) -> frozenset[str]:
        """Ids of the tasks that `ready` gave out and whose end was not reported yet."""
        return self._in(_State.RUNNING)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the tasks that finished, now or before."""
        return self._in(_State.DONE)

    @property
    def is_over(self) -> bool:
        """True when nothing runs and nothing will."""
        return all(state in {_State.DONE, _State.GIVEN_UP} for state in self._state.values())

    def attempts(self, task_id: str) -> int:
        """How many times the task was started."""
        return self._attempts[task_id]

    def ready(self, limit: int) -> list[Task]:
        """At most `limit` tasks that can start now, first models first; they count as running from here."""
        started: list[Task] = []
        while self._queue and len(started) < limit:
            _, name = heapq.heappop(self._queue)
            if self._state[name] is not _State.READY:  # given up while it waited in the queue
                continue
            self._state[name] = _State.RUNNING
            self._attempts[name] += 1
            started.append(self._tasks[name])
        return started

    def finished(self, task_id: str) -> None:
        """The running task has a record: what waited only for it becomes ready."""
        self._end(task_id, _State.DONE)
        for user in self._users[task_id]:
            self._missing[user] -= 1
            if self._missing[user] == 0 and self._state[user] is _State.WAITING:
                self._enqueue(user)

    def failed(self, task_id: str, failure: Failure) -> Literal["retry", "give_up"]:
        """The running task failed: it goes back into the queue, or is given up with what hangs on it."""
        if self._may_retry(task_id, failure):
            self._end(task_id, _State.WAITING)
            self._enqueue(task_id)
            return "retry"
        self._end(task_id, _State.GIVEN_UP)
        self.given_up.setdefault(self._tasks[task_id].model, failure)
        self._give_up_around(task_id)
        return "give_up"

    def _may_retry(self, task_id: str, failure: Failure) -> bool:
        allowed = {"transient": self._max_attempts, "memory": min(_MEMORY_ATTEMPTS, self._max_attempts)}
        return self._attempts[task_id] < allowed.get(failure.error_class, 1) and not self._useless(task_id)

    def _give_up_around(self, task_id: str) -> None:
        """Give up, from a task that was given up, its users and then the needs that nobody is left to use."""
        pending = [task_id]
        while pending:
            name = pending.pop()
            unused = [need for need in self._tasks[name].needs if self._useless(need)]
            for other in (*self._users[name], *unused):
                if self._state[other] in {_State.WAITING, _State.READY}:
                    self._state[other] = _State.GIVEN_UP
                    pending.append(other)

    def _useless(self, task_id: str) -> bool:
        users = self._users[task_id]
        return bool(users) and all(self._state[user] is _State.GIVEN_UP for user in users)

    def _enqueue(self, task_id: str) -> None:
        self._state[task_id] = _State.READY
        heapq.heappush(self._queue, (self._rank[task_id], task_id))

    def _end(self, task_id: str, state: _State) -> None:
        assert self._state[task_id] is _State.RUNNING, (
            f"{task_id} is {self._state[task_id].value}, not running"
        )
        self._state[task_id] = state

    def _in(self, state: _State) -> frozenset[str]:
        return frozenset(name for name, now in self._state.items() if now is state)


def _ranks(tasks: Sequence[Task]) -> dict[str, tuple[int, int]]:
    models: dict[str, int] = {}
    return {task.id: (models.setdefault(task.model, len(models)), row) for row, task in enumerate(tasks)}


def _users(tasks: dict[str, Task]) -> dict[str, list[str]]:
    """Who needs whom, the other way round; every need must be a known task of the same model, in no cycle."""
    users: dict[str, list[str]] = {name: [] for name in tasks}
    missing = {name: len(set(task.needs)) for name, task in tasks.items()}
    for name, task in tasks.items():
        for need in dict.fromkeys(task.needs):
            assert need in tasks, f"{name} needs {need}, which is no task"
            assert tasks[need].model == task.model, f"{name} needs {need}, which is of another model"
            users[need].append(name)
    free = [name for name, count in missing.items() if count == 0]
    for name in free:  # grows while it is walked: the order in which the tasks could run
        for user in users[name]:
            missing[user] -= 1
            if missing[user] == 0:
                free.append(user)
    assert len(free) == len(tasks), f"tasks need each other in a circle: {sorted(set(tasks) - set(free))}"
    return users
