"""Runs tasks in this process, one after the other: no cluster, no start-up, the same bytes."""

from __future__ import annotations

from collections import Counter, deque

from ..tasks import Failure, Task, TaskRecord
from ..worker import RunStep, execute


class InlineExecutor:
    """The executor for small fleets on one machine, and the reference for every other executor."""

    slots = 1

    def __init__(self, run_step: RunStep, ledger_uri: str) -> None:
        self._run_step = run_step
        self._ledger_uri = ledger_uri
        self._queue: deque[Task] = deque()
        self._attempts: Counter[str] = Counter()

    def submit(self, task: Task) -> None:
        """Queue the task; it runs inside `wait`."""
        self._queue.append(task)

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskRecord | Failure]]:
        """Run the oldest queued task to its end; nothing here can interrupt it, so the timeout does not count."""
        del timeout_seconds
        if not self._queue:
            return []
        task = self._queue.popleft()
        self._attempts[task.id] += 1
        return [(task.id, execute(task, self._run_step, self._ledger_uri, attempts=self._attempts[task.id]))]

    def close(self) -> None:
        """Drop what is queued."""
        self._queue.clear()
