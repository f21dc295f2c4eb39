"""How long a run still takes, told from the tasks that are done: means by step, at the speed seen so far.

Nothing is known of steps that no task has ended of: with such ones left, the answer is a lower bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


class Pace:
    """What tasks of each step took in this run."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._ended: Counter[str] = Counter()
        self._first: float | None = None

    def began(self, at_seconds: float) -> None:
        """A task has started; only the first one counts here."""
        if self._first is None:
            self._first = at_seconds

    def ended(self, step: str, seconds: float, *, done: bool) -> None:
        """A task took so long; one that was not `done` kept a worker busy, and tells nothing of the step."""
        if done:
            self._seconds[step] = self._seconds.get(step, 0.0) + seconds
            self._ended[step] += 1
        else:
            self._seconds[""] = self._seconds.get("", 0.0) + seconds

    def left(
        self, now_seconds: float, left: Mapping[str, int], running: Iterable[tuple[str, float]]
    ) -> tuple[float | None, bool]:
        """Seconds until the tasks `left` (by step, those that run included) are done, and whether it takes longer.

        `running` are steps and since when. None while no task has ended. May be asked by another thread.
        """
        ended, seconds = dict(self._ended), dict(self._seconds)
        if self._first is None or not ended:
            return None, False
        means = {step: seconds[step] / count for step, count in ended.items()}
        ages = [(step, max(0.0, now_seconds - since)) for step, since in running]
        work = sum(count * means.get(step, 0.0) for step, count in left.items())
        work -= sum(min(age, means.get(step, 0.0)) for step, age in ages)
        busy = sum(seconds.values()) + sum(age for _, age in ages)
        elapsed = now_seconds - self._first
        if busy <= 0 or elapsed <= 0:
            return None, False
        unknown = any(count and step not in means for step, count in left.items())
        return max(0.0, work) * elapsed / busy, unknown
