"""When a schedule fires, by Debian's cron in a time zone of its own; days on which clocks change included.

A fire is the moment that the cron line names, in UTC. It is begun at its release: up to the schedule's jitter later, by
an amount that follows from the schedule's name and the fire, so that every machine and every try has the same one.
A fixed time that a change of the clocks leaves out fires when the gap ends, one that comes twice fires the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from ..spec.yaml_lines import shortened

MOST_FIRES_SHOWN = 1_000

_NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_LONGEST_LINE = 200
_SOME_DAY = datetime(2000, 1, 1, tzinfo=UTC)
_STAMP = "%Y%m%dT%H%M%SZ"
_LOOKBACKS = [timedelta(days=days) for days in (1 / 24, 1, 32, 400, 4_400, 22_000)]


class CronMistake(ValueError):
    """A cron line that says nothing; `str(error)` says what is wrong with it and what to write."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """When one schedule fires. `cron` has five fields, as `five_fields` gives them."""

    name: str
    cron: str
    zone: tzinfo
    jitter: timedelta = timedelta()

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Fires after a moment, in UTC, without end (a 29 February every four years)."""
        last = moment.astimezone(UTC)
        try:
            for found in CronSim(self.cron, moment.astimezone(self.zone)):
                fire = found.astimezone(UTC)
                if fire > last:  # a fold begins with what was before; two times may fall into one gap
                    yield fire
                    last = fire
        except (CronSimError, OverflowError):  # the calendar's end
            return

    def next(self, moment: datetime, count: int) -> list[datetime]:
        """The first fires after a moment."""
        return list(islice(self.after(moment), count))

    def release(self, fire: datetime) -> datetime:
        """When a fire is to be begun: the same for everybody who asks."""
        seconds = int(self.jitter.total_seconds())
        if not seconds:
            return fire
        digest = hashlib.sha256(f"{self.name} {stamp(fire)}".encode()).digest()
        return fire + timedelta(seconds=int.from_bytes(digest[:8]) % (seconds + 1))

    def newest_due(self, now: datetime, *, since: datetime) -> datetime | None:
        """The fire that was released last, of those after `since`; None if none was released yet."""
        for lookback in _LOOKBACKS:
            start = max(since, now - lookback - self.jitter)
            due = [fire for fire in self._between(start, now) if self.release(fire) <= now]
            newest = max(due, key=lambda fire: (self.release(fire), fire), default=None)
            # One from before the start may have been released as late as its jitter allows.
            if start == since or (newest and self.release(newest) >= start + self.jitter):
                return newest
        return None

    def waiting(self, now: datetime, *, since: datetime) -> datetime | None:
        """The first fire that is past but not released yet."""
        start = max(since, now - self.jitter)
        late = [fire for fire in self._between(start, now) if self.release(fire) > now]
        return min(late, key=self.release, default=None)

    def _between(self, start: datetime, end: datetime) -> Iterator[datetime]:
        for fire in self.after(start):
            if fire > end:
                return
            yield fire


def five_fields(text: str) -> str:
    """A cron line as five fields. Raises CronMistake."""
    if len(text) > _LONGEST_LINE:
        raise CronMistake(f"`{shortened(text)}` is longer than {_LONGEST_LINE} signs; write ranges and steps")
    line = " ".join(text.split())
    if line.startswith("@"):
        if line.lower() not in _NICKNAMES:
            raise CronMistake(f"`{text}` is no cron line; valid words: {', '.join(_NICKNAMES)}")
        return _NICKNAMES[line.lower()]
    fields = line.split(" ")
    if len(fields) != 5:
        raise CronMistake(
            f"`{text}` has {len(fields)} fields; five are needed: minute, hour, day of month, month, day of week"
        )
    try:
        next(CronSim(line, _SOME_DAY))
    except StopIteration:
        raise CronMistake(f"`{text}` never fires: there is no such day") from None
    except CronSimError as error:
        raise CronMistake(f"`{text}`: {_words(str(error))}") from None
    return line


def zone_of(name: str) -> tzinfo:
    """The time zone of a name such as Europe/Berlin. Raises KeyError, ValueError and OSError for what is none."""
    return UTC if name == "UTC" else ZoneInfo(name)


def stamp(moment: datetime) -> str:
    """A moment in a key or an id: UTC, to the second, sorting as time does."""
    return moment.astimezone(UTC).strftime(_STAMP)


def unstamp(text: str) -> datetime:
    """The moment again. Raises ValueError."""
    return datetime.strptime(text, _STAMP).replace(tzinfo=UTC)


def _words(error: str) -> str:
    """`Bad day-of-month` -> what the field takes."""
    field = error.removeprefix("Bad ").strip()
    takes = {
        "minute": "0 to 59",
        "hour": "0 to 23",
        "day-of-month": "1 to 31 as the months have them, or L for the last",
        "month": "1 to 12 or JAN to DEC",
        "day-of-week": "0 to 7 (0 and 7 are Sunday) or SUN to SAT",
    }.get(field)
    return f"the {field} is wrong; it takes {takes}, with `*`, `,`, `-` and `/`" if takes else error
