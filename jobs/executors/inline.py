"""Runs tasks in this process: no cluster, no start-up, the same bytes.

Tasks that stream files wait for disk, network and hashes most of the time: two of them run side by side, as far as
their memory allows. All others run one after the other, alone.
"""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ..errors import UsageError
from ..tasks import Failure, Task, TaskRecord
from ..worker import RunStep, execute

_STREAMING_KINDS = (
    "convert",
    "finish",
)  # they share no state, and leave the interpreter to others while they work
_SIDE_BY_SIDE = 2


def check_gpu() -> None:
    """Raise UsageError if this machine has no GPU that torch can use."""
    from fleetpress.compression.device import pick
    from fleetpress.compression.errors import DeviceMissingError

    try:
        pick(gpu=True)
    except DeviceMissingError as error:
        raise UsageError(str(error)) from None


class InlineExecutor:
    """The executor for small fleets on one machine, and the reference for every other executor.

    `memory_bytes` is what all tasks of a moment may declare together; 0: one task at a time.
    """

    def __init__(self, run_step: RunStep, ledger_uri: str, *, memory_bytes: int = 0) -> None:
        self._run_step = run_step
        self._ledger_uri = ledger_uri
        self._memory_bytes = memory_bytes
        self._queue: deque[Task] = deque()
        self._attempts: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="task")
        self._running: dict[Future[TaskRecord | Failure], Task] = {}

    @property
    def slots(self) -> int:
        """One, until a streaming task has come that leaves memory for another."""
        tasks = [*self._running.values(), *self._queue]
        streams = bool(tasks) and all(task.kind in _STREAMING_KINDS for task in tasks)
        return _SIDE_BY_SIDE if streams and self._memory_bytes else 1

    def submit(self, task: Task) -> None:
        """Queue the task; it runs once `wait` is called."""
        self._queue.append(task)

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskRecord | Failure]]:
        """Run the oldest queued task to its end; only what streams can be left running when the time is over."""
        while self._queue and self._fits(self._queue[0]):
            task = self._queue.popleft()
            self._running[self._pool.submit(self._execute, task)] = task
        if self._running:
            done, _ = wait(self._running, timeout_seconds, FIRST_COMPLETED)
            return [(self._running.pop(future).id, future.result()) for future in done]
        if not self._queue:
            return []
        task = self._queue.popleft()
        return [(task.id, self._execute(task))]

    def close(self) -> None:
        """Drop what is queued; wait for what runs."""
        self._queue.clear()
        self._pool.shutdown(cancel_futures=True)

    def _fits(self, task: Task) -> bool:
        """Whether a streaming task may run now, beside those that do."""
        if task.kind not in _STREAMING_KINDS or len(self._running) == _SIDE_BY_SIDE:
            return False
        declared = task.memory_bytes + sum(other.memory_bytes for other in self._running.values())
        return not self._running or declared <= self._memory_bytes

    def _execute(self, task: Task) -> TaskRecord | Failure:
        self._attempts[task.id] += 1
        return execute(
            task, self._run_step, self._ledger_uri, attempts=self._attempts[task.id], where="inline"
        )
