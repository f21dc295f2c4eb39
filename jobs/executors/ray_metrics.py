"""Metrics of a run through Ray: each node of a cluster offers them to Prometheus at its metrics port.

The driver pushes them to its own node, from a run's events; Ray sends them on every few seconds, and once more when
the driver leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

from ..runs import metric_names as names
from ..runs.events import TASK_OVER

if TYPE_CHECKING:
    from ..runs.events import Event
    from ..runs.progress import Progress

_ESTIMATE_SECONDS = 2.0  # it costs more than the others


class RayMetrics:
    """`update` is a run's listener. `fleet` is the spec's name; `clock` does not go back."""

    def __init__(self, fleet: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._clock = clock
        self._estimate_at = 0.0
        self._metrics = {one.name: _metric(one) for one in names.RUN_METRICS}
        self._shown: dict[tuple[str, str], float] = {}

    def update(self, event: Event, progress: Progress) -> None:
        """Push what an event has changed."""
        for state, count in progress.counts.items():
            self._show(names.MODELS, count, state=state)
        self._show(names.TASKS_LEFT, sum(progress.left.values()))
        self._show(names.TASKS_RUNNING, len(progress.running))
        if self._clock() >= self._estimate_at or not progress.running:
            self._estimate_at = self._clock() + _ESTIMATE_SECONDS
            now = progress.standing()
            known = now.seconds_left is not None and not now.seconds_left_is_least
            self._show(
                names.LEFT_SECONDS, now.seconds_left if known and now.seconds_left is not None else -1.0
            )
        if event.kind in TASK_OVER:
            self._ended(event)

    def _ended(self, event: Event) -> None:
        seconds = event.seconds or 0.0
        self._add(names.READ_BYTES, event.bytes_read, event.step)
        self._add(names.WRITTEN_BYTES, event.bytes_written, event.step)
        self._add(names.BUSY_SECONDS, seconds, event.step)
        self._add(names.RETRIES, event.kind == "retry", event.step)
        self._add(names.GIVE_UPS, event.kind == "give_up", event.step)
        if event.kind == "finished":
            self._metrics[names.STEP_SECONDS.name].observe(
                seconds, {"fleet": self._fleet, "step": event.step}
            )

    def _show(self, metric: names.RunMetric, value: float, **labels: str) -> None:
        """Set a gauge that has changed."""
        place = metric.name, "".join(labels.values())
        if self._shown.get(place) != value:
            self._shown[place] = value
            self._metrics[metric.name].set(float(value), {"fleet": self._fleet, **labels})

    def _add(self, metric: names.RunMetric, value: float, step: str) -> None:
        if value:  # Ray's counters refuse 0
            self._metrics[metric.name].inc(float(value), {"fleet": self._fleet, "step": step})


def _metric(one: names.RunMetric) -> Any:
    labels = ("fleet", *one.labels)
    if one.kind == "histogram":
        return Histogram(one.name, one.meaning, boundaries=list(names.STEP_BUCKETS_SECONDS), tag_keys=labels)
    kind = Gauge if one.kind == "gauge" else Counter
    return kind(one.name, one.meaning, tag_keys=labels)
