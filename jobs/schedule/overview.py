"""How schedules stand: what fires next, what is paused, what runs, what came of the newest fire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from fleetpress.storage.store import ObjectStore

from .claims import Claims
from .file import Schedule
from .fires import stamp
from .records import Control


@dataclass(frozen=True, kw_only=True)
class NextFire:
    """A fire to come: in UTC, in the schedule's own time, and when its job is to be begun."""

    schedule: str
    fire: datetime
    local: datetime
    release: datetime
    clocks_change: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schedule": self.schedule,
            "fire": stamp(self.fire),
            "local": self.local.isoformat(),
            "release": stamp(self.release),
            "clocks_change": self.clocks_change,
        }


def next_fires(schedule: Schedule, now: datetime, count: int) -> Iterator[NextFire]:
    """The fires to come, the nearest first."""
    times = schedule.times
    for fire in times.next(now, count):
        local = fire.astimezone(times.zone)
        yield NextFire(
            schedule=schedule.name,
            fire=fire,
            local=local,
            release=times.release(fire),
            clocks_change=_clocks_change(local),
        )


def _clocks_change(local: datetime) -> bool:
    """Whether the day of a local time has 23 or 25 hours."""
    midnight = local.replace(hour=0, minute=0, second=0)
    return midnight.utcoffset() != (midnight + timedelta(days=1)).utcoffset()


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A schedule as it stands."""

    schedule: Schedule
    next: datetime | None
    control: Control
    running: tuple[str, ...]
    latest: str
    outcome: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.schedule.name,
            "spec": self.schedule.spec,
            "cron": self.schedule.cron,
            "timezone": self.schedule.timezone,
            "next": stamp(self.next) if self.next else None,
            "paused": self.control.paused,
            "paused_by": self.control.by if self.control.paused else None,
            "paused_at": self.control.at if self.control.paused else None,
            "running": list(self.running),
            "latest": self.latest or None,
            "outcome": self.outcome or None,
        }


def standing(store: ObjectStore, schedule: Schedule, now: datetime) -> Standing:
    """How one schedule stands, from the output alone: four requests, or six if it did not fire today."""
    claims = Claims(store, schedule.name)
    latest = claims.latest(now)
    outcome = ""
    if latest is not None:
        told = "skipped" if latest.decision == "skip" else latest.state or "begun"
        outcome = f"{told}: {latest.reason}" if latest.reason else told
    return Standing(
        schedule=schedule,
        next=next(iter(schedule.times.next(now.astimezone(UTC), 1)), None),
        control=claims.control(),
        running=tuple(job.job for job in claims.open_jobs().values() if job.launched),
        latest=latest.fire if latest else "",
        outcome=outcome,
    )
