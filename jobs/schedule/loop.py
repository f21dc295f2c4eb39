"""Tick after tick, for those who have no scheduler to call `tick`: a process that must be kept alive by somebody."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from .file import ScheduleFile
from .tick import TickResult

LONGEST_SLEEP_SECONDS = 60.0  # jobs may be over their deadline, or a schedule resumed, at any time
_LEAST_SLEEP_SECONDS = 0.2


def run(
    file: ScheduleFile,
    tick: Callable[[datetime], TickResult],
    *,
    clock: Callable[[], datetime],
    sleep: Callable[[float], None],
    listener: Callable[[TickResult], None],
) -> None:
    """Tick until interrupted: at every release, and once a minute."""
    while True:
        now = clock()
        listener(tick(now))
        sleep(seconds_to_next(file, now, clock()))


def seconds_to_next(file: ScheduleFile, ticked_at: datetime, now: datetime) -> float:
    """How long to sleep after a tick, so that no release is seen late."""
    releases = []
    for schedule in file.schedules:
        times = schedule.times
        waiting = times.waiting(ticked_at, since=ticked_at - timedelta(days=2))
        coming = [*times.next(ticked_at, 1), *([waiting] if waiting else [])]
        releases += [times.release(fire) for fire in coming]
    to_next = min((release - now).total_seconds() for release in releases) if releases else float("inf")
    return min(max(to_next, _LEAST_SLEEP_SECONDS), LONGEST_SLEEP_SECONDS)
