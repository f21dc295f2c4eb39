"""Which task may run next: a pure state machine, without a clock, a socket or a thread.

The driver asks `ready`, hands the tasks to an executor, and reports every end with `finished` or `failed`. Times are
seconds of any clock that does not go back; the driver says what it is now.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Literal

from ..tasks import (
    Failure,
    Task,
    smaller,
)

_MEMORY_ATTEMPTS = 2  # a second try runs in a smaller unit; a third would only repeat the second
_LOST_ATTEMPTS = 10  # spot machines go one after the other, which says nothing about the task
_FIRST_DELAY_SECONDS = 1.0  # what was tried with delays of up to 20 s by the client itself needs no less
_LONGEST_DELAY_SECONDS = 60.0
_LEAST_BUDGET = 20.0
_BUDGET_SHARE = 0.1  # of all tasks; an ended task gives the same share of a retry back


class _State(Enum):
    WAITING = "waiting"  # for a need
    READY = "ready"  # or will be, once its delay is over
    RUNNING = "running"
    DONE = "done"
    GIVEN_UP = "given up"


_OPEN = (_State.WAITING, _State.READY)
_OVER = (_State.DONE, _State.GIVEN_UP)


class Scheduler:
    """Runs every task after its needs, retries what may pass, and keeps one model's trouble to that model.

    `tasks` sets the order: models as they first appear, so that early ones finish early, and tasks as listed.
    `done` are ids of tasks whose records exist already. A task is started at most `max_attempts` times.
    When a task is given up, so is every task that needs it, and every task that only those would have used.

    Transient failures wait before the next try, each time twice as long. All of them together have a budget, a
    share of the tasks: when a store or a cluster is gone, a large fleet does not try everything three times. Tasks that
    were lost with their machine are tried again beside all that, up to ten times.
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
        self._budget = max(_LEAST_BUDGET, _BUDGET_SHARE * len(tasks))
        self._attempts = dict.fromkeys(self._tasks, 0)
        self._lost = dict.fromkeys(self._tasks, 0)
        self._small: set[str] = set()
        self._state = {name: _State.DONE if name in done else _State.WAITING for name in self._tasks}
        self._left = sum(state is _State.WAITING for state in self._state.values())
        self._left_of = Counter(task.kind for task in tasks if self._state[task.id] is _State.WAITING)
        self._running: set[str] = set()
        self._missing = {
            name: sum(self._state[need] is not _State.DONE for need in set(task.needs))
            for name, task in self._tasks.items()
        }
        self._queue: list[tuple[tuple[int, int], str]] = []
        self._delayed: list[tuple[float, str]] = []
        self.given_up: dict[str, Failure] = {}
        for name in self._tasks:
            if self._missing[name] == 0 and self._state[name] is _State.WAITING:
                self._enqueue(name)

    @property
    def running(self) -> frozenset[str]:
        """Ids of the tasks that `ready` gave out and whose end was not reported yet."""
        return frozenset(self._running)

    @property
    def running_count(self) -> int:
        """How many there are."""
        return len(self._running)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the tasks that finished, now or before."""
        return frozenset(name for name, now in self._state.items() if now is _State.DONE)

    @property
    def is_over(self) -> bool:
        """True when nothing runs and nothing will."""
        return self._left == 0

    @property
    def left(self) -> Mapping[str, int]:
        """How many tasks are not over, by kind; always as it stands."""
        return self._left_of

    @property
    def next_at(self) -> float | None:
        """When the first of the delayed tasks may start; None if none is delayed."""
        return self._delayed[0][0] if self._delayed else None

    def attempts(self, task_id: str) -> int:
        """How many times the task was started."""
        return self._attempts[task_id]

    def ready(self, limit: int, now: float = 0.0) -> list[Task]:
        """At most `limit` tasks that can start now, first models first; they count as running from here."""
        while self._delayed and self._delayed[0][0] <= now:
            name = heapq.heappop(self._delayed)[1]
            heapq.heappush(self._queue, (self._rank[name], name))
        started: list[Task] = []
        while self._queue and len(started) < limit:
            _, name = heapq.heappop(self._queue)
            if self._state[name] is not _State.READY:  # over since it was put into the queue
                continue
            self._state[name] = _State.RUNNING
            self._running.add(name)
            self._attempts[name] += 1
            task = self._tasks[name]
            started.append(smaller(task) if name in self._small else task)
        return started

    def finished(self, task_id: str) -> None:
        """The running task has a record: what waited only for it becomes ready."""
        self._end(task_id, _State.DONE)
        self._budget += _BUDGET_SHARE
        self._release(task_id)

    def found(self, task_ids: Iterable[str]) -> None:
        """Tasks that somebody else has done since: those that did not begin will not."""
        for task_id in task_ids:
            if self._state[task_id] in _OPEN:
                self._close(task_id, _State.DONE)
                self._release(task_id)

    def postponed(self, task_id: str, until: float) -> None:
        """The running task did not begin, because somebody else works on its model: it is ready again at `until`."""
        self._attempts[task_id] -= 1
        self._requeue(task_id, until)

    def failed(self, task_id: str, failure: Failure, now: float = 0.0) -> Literal["retry", "give_up"]:
        """The running task failed: it goes back into the queue, or is given up with what hangs on it."""
        self._lost[task_id] += failure.error_class == "lost"
        if self._may_retry(task_id, failure):
            if failure.error_class == "memory":
                self._small.add(task_id)
                self._requeue(task_id, now)
            else:
                self._budget -= failure.error_class == "transient"
                self._requeue(task_id, now + _delay_seconds(task_id, self._attempts[task_id]))
            return "retry"
        self._end(task_id, _State.GIVEN_UP)
        self.given_up.setdefault(self._tasks[task_id].model, failure)
        self._give_up_around(task_id)
        return "give_up"

    def _may_retry(self, task_id: str, failure: Failure) -> bool:
        lost = self._lost[task_id]
        own = self._attempts[task_id] - lost
        if self._useless(task_id):
            return False
        match failure.error_class:
            case "lost":
                return lost < _LOST_ATTEMPTS
            case "transient":
                return own < self._max_attempts and self._budget >= 1
            case "memory":
                return own < min(_MEMORY_ATTEMPTS, self._max_attempts)
        return False

    def _give_up_around(self, task_id: str) -> None:
        """Give up, from a task that was given up, its users and then the needs that nobody is left to use."""
        pending = [task_id]
        while pending:
            name = pending.pop()
            unused = [need for need in self._tasks[name].needs if self._useless(need)]
            for other in (*self._users[name], *unused):
                if self._state[other] in _OPEN:
                    self._close(other, _State.GIVEN_UP)
                    pending.append(other)

    def _useless(self, task_id: str) -> bool:
        users = self._users[task_id]
        return bool(users) and all(self._state[user] is _State.GIVEN_UP for user in users)

    def _release(self, task_id: str) -> None:
        for user in self._users[task_id]:
            self._missing[user] -= 1
            if self._missing[user] == 0 and self._state[user] is _State.WAITING:
                self._enqueue(user)

    def _enqueue(self, task_id: str) -> None:
        self._state[task_id] = _State.READY
        heapq.heappush(self._queue, (self._rank[task_id], task_id))

    def _requeue(self, task_id: str, at: float) -> None:
        self._check_running(task_id)
        self._running.remove(task_id)
        self._state[task_id] = _State.READY
        heapq.heappush(self._delayed, (at, task_id))

    def _end(self, task_id: str, state: _State) -> None:
        self._check_running(task_id)
        self._running.remove(task_id)
        self._close(task_id, state)

    def _close(self, task_id: str, state: _State) -> None:
        assert self._state[task_id] not in _OVER, task_id
        self._state[task_id] = state
        self._left -= 1
        self._left_of[self._tasks[task_id].kind] -= 1

    def _check_running(self, task_id: str) -> None:
        assert self._state[task_id] is _State.RUNNING, (
            f"{task_id} is {self._state[task_id].value}, not running"
        )


def _delay_seconds(task_id: str, attempts: int) -> float:
    """Twice as long after every try, for some up to a half longer: tasks that failed together come back apart."""
    apart = 1 + (zlib.crc32(f"{task_id} {attempts}".encode()) % 512) / 1024
    return min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** (attempts - 1)) * apart


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
