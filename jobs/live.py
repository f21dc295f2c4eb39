"""A run while it happens, on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from .figures import elapsed, one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live as RichLive

    from .events import Event
    from .progress import Progress

_REFRESHES_PER_SECOND = 4  # drawn by a thread of its own, however many events there are
_TASK_WORDS = {"retry": "is tried again", "give_up": "given up"}
_OVER = ("published", "unchanged", "rejected", "failed")
_LINES_BESIDE_MODELS = 4


class Live:
    """`update` is a run's listener; inside the context, a terminal shows the fleet as it stands."""

    def __init__(self, title: str) -> None:
        self._title = one_line(title)
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()  # the drawing thread reads what `update` writes
        self._tasks: dict[str, dict[str, float]] = {}
        self._progress: Progress | None = None
        self._started = time.monotonic()
        self._display: RichLive | None = None

    def __enter__(self) -> Live:
        self._started = time.monotonic()
        if self._terminal:
            from rich.console import Console
            from rich.live import Live as RichLive

            console = Console(stderr=True)
            self._display = RichLive(
                console=console,
                get_renderable=lambda: self._drawn(console),
                refresh_per_second=_REFRESHES_PER_SECOND,
                transient=True,  # the table of the result takes its place
            )
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def update(self, event: Event, progress: Progress) -> None:
        """Take note of an event; cheap enough for thousands of them."""
        if not self._terminal:
            print(_line(event, progress.seconds), file=sys.stderr, flush=True)
            return
        with self._lock:
            self._progress = progress
            if event.task is None:
                if event.kind in _OVER:
                    self._tasks.pop(event.model, None)
            elif event.kind == "started":
                self._tasks.setdefault(event.model, {})[_label(event)] = time.monotonic()
            else:
                running = self._tasks.get(event.model, {})
                running.pop(_label(event), None)
                if not running:
                    self._tasks.pop(event.model, None)

    def _drawn(self, console: Console) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        with self._lock:
            counts = dict(self._progress.counts) if self._progress else {}
            running = {model: dict(tasks) for model, tasks in self._tasks.items()}
        over, models = sum(counts.get(state, 0) for state in _OVER), sum(counts.values())
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(self._title, "bold"),
            ProgressBar(total=max(1, models), completed=over, width=30),
            f"{over} of {models} models",
            elapsed(now - self._started),
        )
        states = Text(", ".join(f"{count} {state}" for state, count in counts.items() if count), "dim")
        rows = Table.grid(padding=(0, 2))
        shown = max(1, console.height - _LINES_BESIDE_MODELS)
        for model, tasks in list(running.items())[:shown]:
            doing = ", ".join(f"{task} {elapsed(now - since)}" for task, since in tasks.items())
            rows.add_row(
                Text(f"  {model}", no_wrap=True), Text(doing, "dim", no_wrap=True, overflow="ellipsis")
            )
        hidden = len(running) - shown
        more = [Text(f"  and {hidden} more", "dim")] if hidden > 0 else []
        return Group(head, states, rows, *more)


def _line(event: Event, at_seconds: float) -> str:
    words = [f"{at_seconds:.1f}s", event.model]
    if event.task is not None:
        words.append(_label(event))
    words.append(_TASK_WORDS.get(event.kind, event.kind))
    if event.seconds is not None:
        words.append(f"({event.seconds:.1f} s)")
    line = " ".join(words) + (f": {event.text}" if event.text else "")
    return one_line(line)


def _label(event: Event) -> str:
    return (event.task or "").removeprefix(f"{event.model}/")
