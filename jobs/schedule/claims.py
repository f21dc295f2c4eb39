"""What schedules keep in the output: who claimed which fire, which jobs are open, what is paused.

    schedules/<name>/<fire>.json          the claim: created only if absent, so that one tick decides about each fire
    schedules/<name>/open/<fire>.json     the fire may have a job that has not ended; made before the claim
    schedules/<name>/control.json         paused or not, by whom, and since when fires count
    schedules/<name>/since-<digest>.json  when this cron line was first seen: what was before it is not caught up

A tick may die between any two of these writes: whatever a later one finds, it can go on from there. On a server
without conditional writes two ticks may both take a claim for theirs; the job's id, made of schedule and fire, is then
what keeps the second job from being begun.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from fleetpress.storage.errors import AccessDenied
from fleetpress.storage.store import ObjectStore

from .fires import stamp, unstamp
from .records import Claim, Control, Decision, FirstSeen, JobState, OpenJob, read_record, record_bytes

SCHEDULES = "schedules/"
_OPEN = "open/"

_log = logging.getLogger(__name__)


class Claims:
    """The records of one schedule. Raises the store's errors; ArtifactCorrupt for a record that is none of ours."""

    def __init__(self, store: ObjectStore, schedule: str) -> None:
        self.store = store
        self._schedule = schedule
        self._prefix = f"{SCHEDULES}{schedule}/"

    def job_of(self, fire: datetime) -> str:
        """The id of the job of a fire: the same whoever begins it."""
        return job_id(self._schedule, fire)

    def claim(self, fire: datetime) -> Claim | None:
        """What was decided about a fire, if anything was."""
        return read_record(self.store, self._claim_key(fire), Claim)

    def take(
        self, fire: datetime, decision: Decision, *, reason: str, by: str, now: datetime
    ) -> tuple[Claim, bool]:
        """The claim of a fire, and whether it is ours or that of whoever was first."""
        ours = Claim(
            fire=stamp(fire),
            job=self.job_of(fire),
            decision=decision,
            reason=reason,
            by=by,
            at=stamp(now),
            token=secrets.token_hex(8),
        )
        if self.store.put_if_absent(self._claim_key(fire), record_bytes(ours)):
            return ours, True
        return self.claim(fire) or ours, False

    def end(self, fire: datetime, state: JobState, *, reason: str = "") -> None:
        """Write down how the job of a fire ended, and forget that it is open."""
        claim = self.claim(fire)
        if claim is not None:
            told = replace(claim, state=state, reason=reason or claim.reason)
            self.store.put(self._claim_key(fire), record_bytes(told))
        self.forget(fire)

    def open(self, fire: datetime, job: OpenJob) -> None:
        """Say that a fire may get a job; what was said before stays."""
        self.store.put_if_absent(self._open_key(fire), record_bytes(job))

    def note(self, fire: datetime, job: OpenJob) -> None:
        """Replace what is known of an open job."""
        self.store.put(self._open_key(fire), record_bytes(job))

    def forget(self, fire: datetime) -> None:
        """The fire has no open job. Without the right to delete its record stays, and costs every tick two requests."""
        try:
            self.store.delete(self._open_key(fire))
        except AccessDenied as error:
            _log.warning("the record of a job that has ended stays behind (%s)", error)

    def open_jobs(self) -> dict[datetime, OpenJob]:
        """Fires that may have a job, oldest first."""
        found = {}
        prefix = f"{self._prefix}{_OPEN}"
        for key in self.store.sizes(prefix):
            fire = _fire(key.removeprefix(prefix))
            job = read_record(self.store, key, OpenJob) if fire else None
            if fire and job:
                found[fire] = job
        return dict(sorted(found.items()))

    def latest(self, now: datetime) -> Claim | None:
        """The newest claim of this month or the one before it."""
        month = now.astimezone(UTC)
        before = month.replace(day=1) - timedelta(days=1)
        for prefix in (f"{month:%Y%m%d}", f"{month:%Y%m}", f"{before:%Y%m}"):
            fires = [_fire(key.removeprefix(self._prefix)) for key in self.store.sizes(self._prefix + prefix)]
            newest = max((fire for fire in fires if fire), default=None)
            if newest:
                return self.claim(newest)
        return None

    def control(self) -> Control:
        """Whether it is paused."""
        return read_record(self.store, f"{self._prefix}control.json", Control) or Control()

    def pause(self, *, by: str, now: datetime) -> Control:
        """No fire begins a job until `resume`."""
        before = self.control()
        if before.paused:
            return before
        return self._put_control(replace(before, paused=True, by=by, at=stamp(now)))

    def resume(self, *, by: str, now: datetime) -> Control:
        """Fires count again, from now on: those of the pause are not caught up."""
        before = self.control()
        if not before.paused:
            return before
        return self._put_control(Control(paused=False, by=by, at=stamp(now), since=stamp(now)))

    def since(self, cron: str, zone: str, control: Control, *, first_seen: datetime) -> datetime:
        """From when on fires of a cron line count: since it was first seen, and since the schedule was resumed."""
        digest = hashlib.sha256(f"{cron} {zone}".encode()).hexdigest()[:12]
        key = f"{self._prefix}since-{digest}.json"
        seen = read_record(self.store, key, FirstSeen)
        if seen is None:
            ours = FirstSeen(since=stamp(first_seen), cron=cron)
            self.store.put_if_absent(key, record_bytes(ours))
            seen = read_record(self.store, key, FirstSeen) or ours
        return max(unstamp(moment) for moment in (seen.since, control.since) if moment)

    def _put_control(self, control: Control) -> Control:
        self.store.put(f"{self._prefix}control.json", record_bytes(control))
        return control

    def _claim_key(self, fire: datetime) -> str:
        return f"{self._prefix}{stamp(fire)}.json"

    def _open_key(self, fire: datetime) -> str:
        return f"{self._prefix}{_OPEN}{stamp(fire)}.json"


def job_id(schedule: str, fire: datetime) -> str:
    """The id of the job of a fire."""
    return f"{schedule}-{stamp(fire)}"


def fire_of(job: str) -> tuple[str, datetime]:
    """Schedule and fire of a job's id. Raises ValueError."""
    schedule, _, fire = job.rpartition("-")
    return schedule, unstamp(fire)


def _fire(name: str) -> datetime | None:
    """The fire that a record is about; None for other objects."""
    try:
        return unstamp(name.removesuffix(".json")) if name.endswith(".json") else None
    except ValueError:
        return None
