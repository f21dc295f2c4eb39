"""A clock, a launcher that only writes down what it was told, and a schedule file to tick."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fleetpress.jobs.errors import ClusterUnreachable
from fleetpress.jobs.schedule.file import Schedule, ScheduleFile, parse_schedules
from fleetpress.jobs.schedule.records import JobState
from fleetpress.jobs.schedule.tick import Row, Tick, TickResult, tick
from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore


@dataclass
class Cluster:
    """Jobs by id, begun once each, as Ray's Jobs API has them; every call is written down."""

    states: dict[str, JobState] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    is_down: bool = False
    stops_at_once: bool = True

    def launch(self, spec: str, job_id: str) -> None:
        self._call("launch", job_id)
        if job_id not in self.states:
            self.states[job_id] = "running"
            self.calls.append(("begun", job_id))

    def state(self, job_id: str) -> JobState:
        self._call("state", job_id)
        return self.states.get(job_id, "unknown")

    def stop(self, job_id: str) -> None:
        self._call("stop", job_id)
        if self.stops_at_once:
            self.states[job_id] = "stopped"

    def end(self, state: JobState = "succeeded") -> None:
        """Every job ends."""
        self.states = dict.fromkeys(self.states, state)

    @property
    def begun(self) -> list[str]:
        """Jobs in the order in which they were begun."""
        return [job for what, job in self.calls if what == "begun"]

    def _call(self, what: str, job_id: str) -> None:
        if self.is_down:
            raise ClusterUnreachable("nobody answers at http://head:8265; is the cluster up?")
        self.calls.append((what, job_id))


class Memory:
    """What ticks ask of a store, without a disk: a property test has thousands of them."""

    uri = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        if key not in self.objects:
            raise ObjectNotFound(key)
        return self.objects[key]

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self.objects.setdefault(key, data) == data

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {key: len(data) for key, data in sorted(self.objects.items()) if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


class Ticker:
    """Ticks of one schedule file, at whatever moment."""

    def __init__(self, store: Any, options: str, cluster: Cluster) -> None:
        text = (
            f'version: 1\noutput: "{store.uri}"\nschedules:\n  - {{name: s, spec: fleet.yaml, {options}}}\n'
        )
        self.file: ScheduleFile = parse_schedules(text, "schedules.yaml")
        self.store = store
        self.cluster = cluster
        self.clock_seconds = 0.0

    @property
    def schedule(self) -> Schedule:
        return self.file.schedules[0]

    def at(self, moment: str | datetime, *, by: str = "test") -> TickResult:
        """One tick."""
        now = moment if isinstance(moment, datetime) else datetime.fromisoformat(moment).replace(tzinfo=UTC)
        return tick(self.file, self.how(now, by=by), store=self.store)

    def how(self, now: datetime, *, by: str = "test") -> Tick:
        """How a tick of that moment works."""
        return Tick(
            now=now,
            by=by,
            launcher_of=lambda _schedule, _store: self.cluster,
            sleep=self._sleep,
            clock=lambda: self.clock_seconds,
        )

    def every(self, start: str, end: str, minutes: float = 1.0) -> list[Row]:
        """Ticks from one moment to another; what they did beyond waiting and watching."""
        now, last = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (start, end))
        rows: list[Row] = []
        while now <= last:
            rows += [row for row in self.at(now).rows if row.action not in ("waiting", "running")]
            now += timedelta(minutes=minutes)
        return rows

    def _sleep(self, seconds: float) -> None:
        self.clock_seconds += seconds


@pytest.fixture
def store_ticker(store: ObjectStore) -> Callable[[str], Ticker]:
    """A ticker for a schedule with the options that are given, on a folder and on moto."""
    return lambda options: Ticker(store, options, Cluster())


@pytest.fixture(scope="session")
def ticker() -> Callable[[str], Ticker]:
    """The same in memory, with a fresh store and cluster each time."""
    return lambda options: Ticker(Memory(), options, Cluster())
