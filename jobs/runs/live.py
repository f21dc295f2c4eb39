"""A run while it happens, on stderr: a live display on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from . import log_lines
from .view import (
    Rates,
    View,
    drawn,
)

if TYPE_CHECKING:
    from rich.live import Live as RichLive

    from .events import Event
    from .progress import Progress

_REFRESHES_PER_SECOND = 4  # drawn by a thread of its own, however many events there are


class Display:
    """Inside the context a terminal shows, again and again, the view that `look` gives."""

    def __init__(self, look: Callable[[], View]) -> None:
        self._look = look
        self._live: RichLive | None = None

    def __enter__(self) -> Display:
        from rich.console import Console
        from rich.live import Live as RichLive

        console = Console(stderr=True)
        self._live = RichLive(
            console=console,
            get_renderable=lambda: drawn(self._look(), console),
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,  # the table of the result takes its place
        )
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def on_a_terminal() -> bool:
    """Whether there is a display to draw on, and words are wanted."""
    return sys.stderr.isatty() and not log_lines.is_json()


class Live:
    """`update` is a run's listener; inside the context, a terminal shows the fleet as it stands."""

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._clock = clock
        self._started = clock()
        self._progress: Progress | None = None
        self._rates = Rates()
        self._display = Display(self.view) if on_a_terminal() else None

    def __enter__(self) -> Live:
        if self._display is not None:
            self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.__exit__(kind, error, trace)

    def update(self, event: Event, progress: Progress) -> None:
        """Take note of an event; cheap enough for thousands of them."""
        if self._display is not None:
            self._progress = progress
        else:
            log_lines.tell(event, run=progress.run, at_seconds=progress.noted_at_seconds)

    def view(self) -> View:
        """The run as it stands; asked by the drawing thread."""
        progress, seconds = self._progress, self._clock() - self._started
        if progress is None:
            return View(title=self._title, seconds=seconds, counts={})
        standing = progress.standing()
        return View(
            title=self._title,
            seconds=seconds,
            counts=dict(progress.counts),
            standing=standing,
            rates=self._rates.see(progress.seconds, standing),
        )
