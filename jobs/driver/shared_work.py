"""Tasks of several models that are the same work: done once in a run, and no slot is held for waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from ..tasks import (
    Failure,
    Task,
    TaskRecord,
)

# What these write lies below the model's name, so it serves no other model.
_OWN_KINDS = ("advance", "solve", "open", "convert", "finish", "assemble", "publish")

_End = TypeVar("_End", TaskRecord, Failure)


class SharedWork:
    """The first task of some work runs; those that come meanwhile wait for its end, later ones get its record.

    A failure is that of all who waited; each may try again.
    """

    def __init__(self) -> None:
        self._flights: dict[str, list[Task]] = {}
        self._records: dict[str, TaskRecord] = {}
        self._work: dict[str, str] = {}

    @property
    def waiting(self) -> int:
        """How many tasks have begun and need no slot."""
        return sum(len(tasks) - 1 for tasks in self._flights.values())

    def begin(self, task: Task) -> TaskRecord | None:
        """The task's record if the work is done; otherwise the task is in flight from here."""
        work = self._work.setdefault(task.id, task.id if task.kind in _OWN_KINDS else task.digest)
        if work in self._records:
            return _free(self._records[work])
        self._flights.setdefault(work, []).append(task)
        return None

    def is_first(self, task: Task) -> bool:
        """Whether the task in flight is the one to run."""
        return self._flights[self._work[task.id]][0] is task

    def ended(self, task_id: str, end: TaskRecord | Failure) -> Iterator[tuple[Task, TaskRecord | Failure]]:
        """The end of the task that ran, for it and for all that waited."""
        work = self._work[task_id]
        first, *others = self._flights.pop(work)
        if isinstance(end, TaskRecord):
            self._records[work] = end
        yield first, end
        for task in others:
            if isinstance(end, TaskRecord):
                yield task, _free(end)
            else:
                yield task, _free(replace(end, task=task.id, model=task.model, details=""))


def _free(end: _End) -> _End:
    """The same end of a task that only waited for it."""
    return replace(end, seconds=0.0, where="", bytes_read=0, bytes_written=0)
