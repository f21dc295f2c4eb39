"""What a run says of itself while it works: states of models, events, and the summary in the output."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from fleetpress.storage.errors import StorageError
from fleetpress.storage.store import ObjectStore

from ..runs.events import (
    Event,
    fields_of,
    json_line,
)
from ..runs.figures import accepted_drop
from ..runs.past_runs import Past, look_back
from ..runs.progress import Listener, Progress
from ..runs.results import (
    EVENTS,
    RUNS,
    SPEC,
    FleetResult,
    ModelResult,
    RunState,
    SummaryWriter,
    layers_of,
)
from ..spec.fleet_spec import Spec
from .versions import versions

_log = logging.getLogger(__name__)


class Journal:
    """The states and events of one run. Every change costs the same, however large the fleet is."""

    def __init__(
        self,
        store: ObjectStore,
        run: str,
        spec: Spec,
        listener: Listener | None,
        *,
        executor: str = "",
        job: str | None = None,
    ) -> None:
        self.progress = Progress(run=run, started=time.monotonic(), executor=executor)
        self.warnings: list[str] = []
        self._accepted: Mapping[str, float | str] = {}
        self._past = Past(ended=None, done=None, reads=0)
        self._versions = versions()
        self._store = store
        self._spec = spec
        self._listeners = [listener] if listener else []
        self._job = job
        self._events: list[bytes] = []
        self._summary = SummaryWriter(store)

    def accept(self, drops: Mapping[str, float | str]) -> None:
        """How much worse each model's metric may get, as the spec says it: absolute, or as `1%` of the metric."""
        self._accepted = drops

    def look_back(self) -> FleetResult | None:
        """The latest run before this one that has ended; the page tells what has changed since."""
        self._past = look_back(self._store, self._spec.name, self.progress.run)
        return self._past.ended

    def set(self, model: ModelResult, *, quiet: bool = False) -> None:
        """A model reached a state."""
        model = replace(model, max_drop=accepted_drop(self._accepted.get(model.name), model.before))
        self.progress.set(model)
        if quiet:
            self._summary.refresh(self.result)
        else:
            self.tell(Event(kind=model.state, model=model.name, text=model.reason or ""))

    def listen(self, listener: Listener) -> None:
        """Pass events on to one more."""
        self._listeners.append(listener)

    def tell(self, event: Event) -> None:
        """Note an event, and pass it on."""
        at_seconds = self.progress.seconds
        self.progress.note(event, at_seconds)
        self._events.append(json_line(fields_of(event, at_seconds)).encode())
        for listener in self._listeners:
            listener(event, self.progress)
        self._summary.refresh(self.result)

    def warn(self, text: str) -> None:
        """Say it now, and in the summary."""
        self.warnings.append(text)
        _log.warning("%s", text)

    def result(self, state: RunState = "running") -> FleetResult:
        """The run as it stands."""
        found = FleetResult(
            run=self.progress.run,
            state="running",
            name=self._spec.name,
            output=self._spec.output,
            models=tuple(self.progress.models.values()),
            seconds=self.progress.seconds,
            warnings=tuple(self.warnings),
            job=self._job,
            versions=self._versions,
            **vars(self.progress.standing()),
        )
        return found if state == "running" else found.ended(state)

    def begin(self) -> None:
        """The first summary: from here on the run can be seen."""
        self._summary.write(self.result)
        text = self._spec.text
        if text is not None:
            self._store.put(f"{RUNS}{self.progress.run}/{SPEC}", text.encode())

    def finish(self, state: RunState) -> FleetResult:
        """Events, page and the last summary."""
        from ..report import Material, write_end

        result = self.result(state)
        lines = b"".join(event + b"\n" for event in self._events)
        self._store.put(f"{RUNS}{result.run}/{EVENTS}", lines)
        material = Material(
            layers=layers_of(self._store, result),
            previous=self._past.done,
            events=self._events,
            spec_text=self._spec.text,
        )
        write_end(self._store, result, material)
        return result

    def abandon(self) -> None:
        """Finish as far as possible: what ended the run is told, not what follows from it."""
        with suppress(StorageError):
            self.finish("interrupted")
