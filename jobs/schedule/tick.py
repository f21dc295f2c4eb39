"""One look at all schedules: begin what is due, note what is skipped and why, end what is over its deadline.

A tick keeps nothing: any machine may do the next one, two may do one at the same moment, and one that dies is gone on
with. It decides about at most one fire of each schedule, the one that was released last; older ones that no tick saw
are passed over. Order of writes: open job, claim, launch, open job again; a later tick finishes what a dead one began.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from fleetpress.storage.errors import UNUSABLE_STORE, StorageError
from fleetpress.storage.store import ObjectStore, open_store

from ..errors import ClusterUnreachable, FleetpressError
from ..runs.figures import elapsed
from .claims import Claims
from .file import Schedule, ScheduleFile
from .fires import stamp, unstamp
from .launching import Launcher, LauncherOf, launcher_of
from .records import ENDED, JobState, OpenJob

LAUNCH_SECONDS = 600.0  # a tick that has not begun its job by then has died on the way
CLAIM_SECONDS = 60.0  # and one that has not claimed the fire that it wanted
_REPLACE_SECONDS = 90.0
_LOOK_SECONDS = 0.5

Action = Literal["begun", "skipped", "waiting", "running", "ended", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that a tick did or left, and why."""

    schedule: str
    action: Action
    fire: str = ""
    job: str = ""
    reason: str = ""
    unreachable: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: value for name, value in vars(self).items() if name != "unreachable"}


@dataclass(frozen=True, kw_only=True)
class TickResult:
    """What a tick did at a moment, in the order of the file."""

    at: str
    rows: tuple[Row, ...]

    @property
    def exit_code(self) -> int:
        """0 everything was done; 3 something failed, 4 everything, 5 everything because nothing answers."""
        failed = [row for row in self.rows if row.action == "failed"]
        if not failed:
            return 0
        if {row.schedule for row in self.rows} - {row.schedule for row in failed}:
            return 3
        return 5 if all(row.unreachable for row in failed) else 4

    def without_quiet_rows(self) -> TickResult:
        """The same without what goes on as before."""
        rows = tuple(row for row in self.rows if row.action not in ("waiting", "running"))
        return replace(self, rows=rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"at": self.at, "rows": [row.as_dict() for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class Tick:
    """How a tick works: its moment, its name in the records, and what begins jobs.

    With `only_looks` it begins nothing, and only sees how earlier jobs stand.
    """

    now: datetime
    by: str
    only_looks: bool = False
    launcher_of: LauncherOf = launcher_of
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


def tick(
    file: ScheduleFile, how: Tick, *, only: str | None = None, store: ObjectStore | None = None
) -> TickResult:
    """Do what is due of every schedule, or of one. One that fails never stops the others.

    `store` is where the claims lie: the file's output, unless it is given.
    """
    schedules = file.schedules if only is None else (file.named(only),)
    store = store or open_store(file.output)
    rows: list[Row] = []
    for schedule in schedules:
        rows += _Look(store, schedule, how).rows()
    return TickResult(at=stamp(how.now), rows=tuple(rows))


class _Look:
    """One schedule at one moment."""

    def __init__(self, store: ObjectStore, schedule: Schedule, how: Tick) -> None:
        self._store = store
        self._schedule = schedule
        self._how = how
        self._claims = Claims(store, schedule.name)
        self._active: dict[datetime, OpenJob] = {}  # jobs that live, or may live
        self._is_unsure = False  # whether of one of them nobody can tell

    def rows(self) -> list[Row]:
        """What was done."""
        rows: list[Row] = []
        try:
            for row in self._work():
                rows.append(row)
        except (FleetpressError, StorageError) as error:
            rows.append(self._failed(error))
        return rows

    def _work(self) -> Iterator[Row]:
        schedule, now = self._schedule, self._how.now
        control = self._claims.control()
        # A first tick may be started by the very fire that it is for, as Kubernetes does.
        first_seen = now - timedelta(seconds=schedule.grace_seconds + schedule.jitter_seconds)
        since = self._claims.since(schedule.cron, schedule.timezone, control, first_seen=first_seen)
        newest = schedule.times.newest_due(now, since=since)
        for fire, job in self._claims.open_jobs().items():
            try:
                is_wanted = fire == newest and not control.paused and not self._how.only_looks
                yield from self._settle(fire, job, is_wanted=is_wanted)
            except (FleetpressError, StorageError) as error:
                self._active[fire] = job
                self._is_unsure = True
                yield self._failed(error, fire)
        if self._how.only_looks:
            return
        if newest is None or self._claims.claim(newest) is not None:
            yield self._row("waiting", None, _told_next(schedule.times.next(now, 1)))
        elif reason := "paused" if control.paused else self._why_missed(newest):
            claim, _ = self._claims.take(newest, "skip", reason=reason, by=self._how.by, now=now)
            yield self._row("skipped", newest, claim.reason)
        elif self._is_unsure and schedule.concurrency != "allow":
            yield self._row("waiting", newest, "until it can be told whether an earlier job still runs")
        else:
            yield from self._begin(newest)

    # ---- jobs that were begun before

    def _settle(self, fire: datetime, job: OpenJob, *, is_wanted: bool) -> Iterator[Row]:
        """Go on with what an earlier tick began, or see how its job stands."""
        if self._how.only_looks and not job.launched:
            return
        claim = self._claims.claim(fire)
        if claim is None:  # whoever opened it is about to claim it, or died
            if self._is_younger(job, CLAIM_SECONDS):
                self._active[fire] = job
            elif not is_wanted:
                self._claims.forget(fire)
        elif claim.decision == "skip" or claim.state:
            self._claims.forget(fire)
        elif job.launched:
            yield from self._watch(fire, job)
        elif not job.problem and self._is_younger(job, LAUNCH_SECONDS):
            self._active[fire] = job
        elif is_wanted and self._lateness(fire) <= self._schedule.latest_start:
            yield self._launch(fire, job, f"tried again: {job.problem or 'whoever claimed it died'}")
        else:
            reason = f"could not be begun in time: {job.problem or 'whoever claimed it died'}"
            self._claims.end(fire, "failed", reason=reason)
            yield self._row("skipped", fire, reason)

    def _watch(self, fire: datetime, job: OpenJob) -> Iterator[Row]:
        launcher = self._launcher(job)
        try:
            state = launcher.state(job.job)
        except ClusterUnreachable:
            if job.address == (self._schedule.address or ""):
                raise
            state = "unknown"  # the file names another cluster by now: nobody will ever know
        limit = self._schedule.deadline_seconds
        is_over = limit is not None and self._how.now - unstamp(job.at) > timedelta(seconds=limit)
        if state not in ENDED and is_over:
            launcher.stop(job.job)
            state = launcher.state(job.job)
            reason = f"over its deadline of {elapsed(limit or 0.0)}"
            yield self._row("stopped", fire, reason)
            if state in ENDED:
                self._claims.end(fire, state, reason=reason)
                return
        if state in ENDED:
            self._claims.end(fire, state)
            yield self._row("ended", fire, state)
        else:
            self._active[fire] = job
            yield self._row("running", fire, state if state != "running" else "")

    # ---- the fire that is due

    def _why_missed(self, fire: datetime) -> str:
        late, latest = self._lateness(fire), self._schedule.latest_start
        if late <= latest:
            return ""
        limit = elapsed(latest.total_seconds())
        return f"missed: seen {elapsed(late.total_seconds())} late, more than {limit}"

    def _begin(self, fire: datetime) -> Iterator[Row]:
        schedule, how = self._schedule, self._how
        job = OpenJob(
            fire=stamp(fire),
            job=self._claims.job_of(fire),
            address=schedule.address or "",
            by=how.by,
            at=stamp(how.now),
        )
        self._claims.open(fire, job)  # before looking for others: of two ticks, one at least sees the other
        others = self._others(fire)
        reason = ""
        if others and schedule.concurrency == "forbid":
            reason = f"{', '.join(other.job for other in others.values())} is still running"
        claim, is_ours = self._claims.take(
            fire,
            "skip" if reason else "run",
            reason=reason or self._late_words(fire),
            by=how.by,
            now=how.now,
        )
        if not is_ours:
            yield self._row("skipped", fire, f"another tick was first: {claim.by}")
        elif claim.decision == "skip":
            self._claims.forget(fire)
            yield self._row("skipped", fire, claim.reason)
        else:
            if schedule.concurrency == "replace":
                yield from self._replace(others)
            yield self._launch(fire, job, claim.reason)

    def _others(self, fire: datetime) -> dict[datetime, OpenJob]:
        """Jobs of other fires that may live, those included that a tick at this very moment is about to begin."""
        if self._schedule.concurrency == "allow":
            return {}
        found = {
            other: job
            for other, job in self._claims.open_jobs().items()
            if other < fire and (other in self._active or self._is_younger(job, CLAIM_SECONDS))
        }
        return {**{other: job for other, job in self._active.items() if other != fire}, **found}

    def _replace(self, others: dict[datetime, OpenJob]) -> Iterator[Row]:
        for other, job in others.items():
            launcher = self._launcher(job)
            launcher.stop(job.job)
            state = self._ended(launcher, job)
            if state in ENDED:
                self._claims.end(other, state, reason="replaced by a newer fire")
                yield self._row("stopped", other, "replaced by a newer fire")
            else:
                yield self._row("running", other, "asked to make room for a newer fire, and still busy")

    def _ended(self, launcher: Launcher, job: OpenJob) -> JobState:
        ends_at = self._how.clock() + _REPLACE_SECONDS
        while (state := launcher.state(job.job)) not in ENDED and self._how.clock() < ends_at:
            self._how.sleep(_LOOK_SECONDS)
        return state

    def _launch(self, fire: datetime, job: OpenJob, reason: str) -> Row:
        how = self._how
        tried = replace(job, by=how.by, at=stamp(how.now), problem="", address=self._schedule.address or "")
        try:
            self._launcher(tried).launch(self._schedule.spec, job.job)
        except (FleetpressError, StorageError) as error:
            self._claims.note(fire, replace(tried, problem=str(error)))
            return self._failed(error, fire)
        self._claims.note(fire, replace(tried, launched=True))
        self._active[fire] = tried
        return self._row("begun", fire, reason)

    # ---- what both need

    def _launcher(self, job: OpenJob) -> Launcher:
        """For where the job is, even if the file says another place by now."""
        address = job.address or None
        schedule = self._schedule.model_copy(update={"address": address})
        return self._how.launcher_of(schedule, self._store)

    def _is_younger(self, job: OpenJob, seconds: float) -> bool:
        """Whether the tick that wrote this may be on its way still."""
        return self._how.now - unstamp(job.at) <= timedelta(seconds=seconds)

    def _lateness(self, fire: datetime) -> timedelta:
        return self._how.now - self._schedule.times.release(fire)

    def _late_words(self, fire: datetime) -> str:
        late = self._lateness(fire).total_seconds()
        return f"{elapsed(late)} late" if late > self._schedule.grace_seconds else ""

    def _row(self, action: Action, fire: datetime | None, reason: str = "") -> Row:
        name = self._schedule.name
        if fire is None:
            return Row(schedule=name, action=action, reason=reason)
        return Row(
            schedule=name, action=action, fire=stamp(fire), job=self._claims.job_of(fire), reason=reason
        )

    def _failed(self, error: Exception, fire: datetime | None = None) -> Row:
        unreachable = isinstance(error, (ClusterUnreachable, *UNUSABLE_STORE))
        return replace(self._row("failed", fire, str(error)), unreachable=unreachable)


def _told_next(fires: list[datetime]) -> str:
    return f"next fire at {fires[0]:%Y-%m-%d %H:%M} UTC" if fires else "never fires again"
