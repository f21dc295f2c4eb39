"""How a run that is under way is shown: the same for one in this process and one that is watched from elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .events import MODEL_OVER
from .figures import (
    elapsed,
    one_line,
    sized,
)
from .results import Standing

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_LINES_BESIDE_MODELS = 6
_RATE_SECONDS = 60.0


class Rates:
    """Bytes per second of the last minute, from totals that were seen at times of the run's own clock."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque([(0.0, 0, 0)])

    def see(self, at_seconds: float, standing: Standing) -> tuple[float, float]:
        """What was read and written a second, now that these totals are known."""
        seen, now = self._seen, (at_seconds, standing.bytes_read, standing.bytes_written)
        if now[1:] != seen[-1][1:]:
            seen.append(now)
        while len(seen) > 1 and seen[1][0] <= at_seconds - _RATE_SECONDS:
            seen.popleft()
        since, read, written = seen[0]
        passed = max(at_seconds - since, 1.0)
        return (now[1] - read) / passed, (now[2] - written) / passed


@dataclass(frozen=True, kw_only=True)
class View:
    """A run at one moment; `trouble` is what makes the rest doubtful."""

    title: str
    seconds: float
    counts: Mapping[str, int]
    standing: Standing = field(default_factory=Standing)
    rates: tuple[float, float] = (0.0, 0.0)
    trouble: str = ""

    @property
    def models(self) -> int:
        """Of the fleet."""
        return sum(self.counts.values())

    @property
    def models_over(self) -> int:
        """Those with their last state."""
        return sum(self.counts.get(state, 0) for state in MODEL_OVER)

    @property
    def work(self) -> str:
        """Tasks, bytes and the time left, in one line; empty before there is any."""
        now = self.standing
        if not now.tasks_total:
            return ""
        parts = [f"{now.tasks_total - now.tasks_left} of {now.tasks_total} tasks"]
        moved = ((now.bytes_read, "read"), (now.bytes_written, "written"))
        parts += [
            f"{sized(size)} {what} ({sized(rate)}/s)"
            for (size, what), rate in zip(moved, self.rates, strict=True)
        ]
        if now.retries:
            parts.append(f"{now.retries} {'retry' if now.retries == 1 else 'retries'}")
        if now.tasks_left and now.seconds_left is not None:
            how = "more than" if now.seconds_left_is_least else "about"
            parts.append(f"{how} {_roughly(now.seconds_left)} left")
        return ", ".join(parts)


def words(view: View) -> str:
    """The view on one line of plain text."""
    parts = [f"{view.models_over} of {view.models} models", view.work, view.trouble]
    return one_line(f"{view.seconds:.1f}s " + ", ".join(part for part in parts if part))


def drawn(view: View, console: Console) -> RenderableType:
    """The view on a terminal: a bar, states, work, and the models that are worked on, as many as there is room for."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(one_line(view.title), "bold"),
        ProgressBar(total=max(1, view.models), completed=view.models_over, width=30),
        f"{view.models_over} of {view.models} models",
        elapsed(view.seconds),
    )
    lines: list[RenderableType] = [head]
    states = ", ".join(f"{count} {state}" for state, count in view.counts.items() if count)
    lines += [Text(text, style) for text, style in ((states, "dim"), (view.work, "")) if text]
    if view.trouble:
        lines.append(Text(one_line(view.trouble), "yellow"))
    return Group(*lines, *_running(view.standing, max(1, console.height - _LINES_BESIDE_MODELS)))


def _running(standing: Standing, most: int) -> list[RenderableType]:
    """A line for each model with its tasks."""
    from rich.table import Table
    from rich.text import Text

    models: dict[str, list[str]] = {}
    for task in standing.running:
        models.setdefault(one_line(task.model), []).append(f"{one_line(task.task)} {elapsed(task.seconds)}")
    rows = Table.grid(padding=(0, 2))
    shown = 0
    for model, tasks in list(models.items())[:most]:
        shown += len(tasks)
        rows.add_row(
            Text(f"  {model}", no_wrap=True), Text(", ".join(tasks), "dim", no_wrap=True, overflow="ellipsis")
        )
    hidden = standing.tasks_running - shown
    more = [Text(f"  and {hidden} more {'task' if hidden == 1 else 'tasks'}", "dim")] if hidden > 0 else []
    return [rows, *more]


def _roughly(seconds: float) -> str:
    """No more digits than the estimate is worth."""
    if seconds < 10:
        return f"{max(1, round(seconds))} s"
    return (
        f"{round(seconds / 5) * 5} s"
        if seconds < 60
        else elapsed(60 * round(seconds / 60)).replace(" 00 s", "")
    )
