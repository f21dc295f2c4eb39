"""A run as its listeners see it: a live view that costs the same for every event, however large the fleet is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import islice

from .events import (
    TASK_OVER,
    Event,
    label_of,
)
from .results import (
    ModelResult,
    RunningTask,
    Standing,
)
from .time_left import Pace

_RUNNING_TOLD = 50  # tasks of a summary


class Progress:
    """States of models, tasks that run, and what was moved. `clock` gives seconds and does not go back."""

    def __init__(
        self, *, run: str, started: float, executor: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run = run
        self.executor = executor
        self.models: dict[str, ModelResult] = {}
        self.counts: dict[str, int] = {}
        self.running: dict[str, tuple[Event, float]] = {}  # by task; when it started
        self.tasks = 0  # of all models that are worked on, those done before included
        self.left: Mapping[str, int] = {}  # tasks that are neither done nor given up, by step
        self.bytes_read = self.bytes_written = self.retries = 0
        self.noted_at_seconds = 0.0  # the latest event: read once, so that all who tell of it agree
        self._pace = Pace()
        self._started = started
        self._clock = clock

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return round(self._clock() - self._started, 3)

    def set(self, model: ModelResult) -> None:
        """A model reached a state."""
        before = self.models.get(model.name)
        if before is not None:
            self.counts[before.state] -= 1
        self.models[model.name] = model
        self.counts[model.state] = self.counts.get(model.state, 0) + 1

    def note(self, event: Event, at_seconds: float) -> None:
        """Something happened at this moment: a task started or ended, or a model reached a state."""
        self.noted_at_seconds = at_seconds
        if event.task is None:
            return
        if event.kind == "started":
            self.running[event.task] = (event, at_seconds)
            self._pace.began(at_seconds)
        elif event.kind in TASK_OVER:
            self.running.pop(event.task, None)
            self.bytes_read += event.bytes_read
            self.bytes_written += event.bytes_written
            self.retries += event.kind == "retry"
            self._pace.ended(event.step, event.seconds or 0.0, done=event.kind == "finished")

    def standing(self) -> Standing:
        """The tasks as they stand; may be asked by another thread than the one that notes."""
        now, running, left = self.seconds, list(self.running.values()), dict(self.left)
        seconds_left, is_longer = self._pace.left(
            now, left, ((event.step, since) for event, since in running)
        )
        return Standing(
            executor=self.executor,
            tasks_total=self.tasks,
            tasks_left=sum(left.values()),
            tasks_running=len(running),
            running=tuple(
                RunningTask(
                    model=event.model,
                    task=label_of(event.model, event.task or ""),
                    seconds=round(now - since, 3),
                )
                for event, since in islice(running, _RUNNING_TOLD)
            ),
            retries=self.retries,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            seconds_left=None if seconds_left is None else round(seconds_left, 1),
            seconds_left_is_least=is_longer,
        )


Listener = Callable[[Event, Progress], None]
"""What is told of every event, with the run as it then stands."""
