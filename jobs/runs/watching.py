"""Watch a run that was started elsewhere, from the bucket alone: `fleetpress status OUTPUT [RUN] --watch`.

A look is one question whether the summary has changed, its bytes if it has, and the run's sign of life: three requests
at most, every two seconds, whatever the size of the fleet. A large summary is read less often than it is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from fleetpress.storage.errors import StoreUnreachable
from fleetpress.storage.store import ObjectStore

from . import log_lines
from .events import MODEL_OVER, Event
from .heartbeat import DEAD_SECONDS, Watch
from .live import Display, on_a_terminal
from .results import (
    FleetResult,
    counts,
    read_result,
    summary_key,
)
from .view import (
    Rates,
    View,
    words,
)

_LOOK_SECONDS = 2.0
_READING_SHARE = 0.2  # of the time may go into reading summaries
_PATIENCE_SECONDS = 60.0  # with a driver or a store that says nothing
_PROGRESS_SECONDS = 30.0  # between two lines of progress, where there is no display


class Watcher:
    """The looks at one run. `clock` and `sleep` are those of the time that is waited."""

    def __init__(
        self,
        store: ObjectStore,
        run: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._watch = Watch(store, clock)
        self._etag = ""
        self._next_read = 0.0
        self.result = read_result(store, run)
        self.run = self.result.run
        self._seen_at = clock()  # the summary, as it is now
        self._is_gone = False
        self._alive_at = clock()
        self._answered_at = clock()
        self._rates = Rates()
        self._rate = self._rates.see(self.result.seconds, self.result)
        self._trouble = ""
        self._models = {model.name: model.state for model in self.result.models}
        self._told_at, self._told_trouble = clock() - _PROGRESS_SECONDS, False

    def follow(self) -> FleetResult:
        """Show the run until it is over, or has shown no sign of life for a minute: then it is still "running".

        Raises StoreUnreachable for a store that has not answered for as long.
        """
        shown = Display(self.view) if on_a_terminal() else nullcontext()
        with shown as display:
            while True:
                if display is None:
                    self._tell()
                if self.result.state != "running" or self._is_dead():
                    return self.result
                self._sleep(_LOOK_SECONDS)
                self._look()

    def view(self) -> View:
        """The run as far as it is known; asked by the drawing thread, too."""
        result, passed = self.result, self._clock() - self._seen_at
        running = tuple(replace(task, seconds=task.seconds + passed) for task in result.running)
        left = result.seconds_left
        return View(
            title=f"{result.name} {result.run}",
            seconds=result.seconds + (passed if result.state == "running" else 0.0),
            counts=counts(result.models),
            standing=replace(
                result, running=running, seconds_left=None if left is None else max(0.0, left - passed)
            ),
            rates=self._rate,
            trouble=self._trouble,
        )

    def _look(self) -> None:
        now = self._clock()
        try:
            self._read(now)
            silent = self._watch.silent_seconds(self.run)
            self._is_gone = silent is None
            if silent is not None:
                self._alive_at = now - silent
            self._answered_at, self._trouble = now, ""
        except StoreUnreachable as error:
            if now - self._answered_at > _PATIENCE_SECONDS:
                raise
            self._alive_at = now  # nothing is known of the run
            self._trouble = f"the store does not answer: {error}"
            return
        if now - self._alive_at >= DEAD_SECONDS:
            self._trouble = f"no sign of life for {now - self._alive_at:.0f} s"

    def _read(self, now: float) -> None:
        """The summary, if it is another one; at once when the run may be over."""
        if now < self._next_read and not self._is_gone:
            return
        etag = self._store.head(summary_key(self.run)).etag
        if etag == self._etag:
            return
        found, self._etag = read_result(self._store, self.run), etag
        read_at = self._clock()
        self._next_read = read_at + (read_at - now) / _READING_SHARE
        if found != self.result:
            self.result, self._seen_at = found, read_at
            self._rate = self._rates.see(found.seconds, found)

    def _is_dead(self) -> bool:
        return self._clock() - self._alive_at > _PATIENCE_SECONDS

    def _tell(self) -> None:
        """What is new, as lines."""
        before, seconds = self._models, self.result.seconds
        self._models = {model.name: model.state for model in self.result.models}
        for model in self.result.models:
            if model.state in MODEL_OVER and model.state != before.get(model.name):
                event = Event(kind=model.state, model=model.name, text=model.reason or "")
                log_lines.tell(event, run=self.run, at_seconds=seconds)
        now = self._clock()
        is_news = bool(self._trouble) != self._told_trouble
        if is_news or now - self._told_at >= _PROGRESS_SECONDS:
            self._told_at, self._told_trouble = now, bool(self._trouble)
            view = self.view()
            log_lines.report(words(view), run=self.run, at_seconds=round(view.seconds, 3), **_fields(view))


def _fields(view: View) -> dict[str, object]:
    """A view as the fields of a JSON line."""
    now = view.standing
    return {
        "models": {state: count for state, count in view.counts.items() if count},
        "tasks_total": now.tasks_total,
        "tasks_left": now.tasks_left,
        "tasks_running": now.tasks_running,
        "retries": now.retries,
        "bytes_read": now.bytes_read,
        "bytes_written": now.bytes_written,
        "seconds_left": now.seconds_left,
        "seconds_left_is_least": now.seconds_left_is_least,
        **({"text": view.trouble} if view.trouble else {}),
    }
