"""What the verbs of schedules print on stdout: plain lines that a script can cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..spec.yaml_lines import told
from .fires import unstamp
from .overview import NextFire, Standing
from .tick import TickResult

_GAP = "  "
_MISSING = "-"


def tick_lines(result: TickResult) -> list[str]:
    """One line for each thing that a tick did or left: `<schedule>  <what>: <why>`."""
    rows = []
    for row in result.rows:
        words = f"{row.action}: {row.reason}" if row.reason else row.action
        rows.append((row.schedule, row.job or _MISSING, words))
    return _columns(rows)


def next_lines(fires: Iterable[NextFire]) -> list[str]:
    """When, here and in UTC; days with a change of the clocks are marked."""
    rows = [("schedule", "local time", "UTC", "begins")]
    for fire in fires:
        late = int((fire.release - fire.fire).total_seconds())
        local = f"{fire.local:%a %Y-%m-%d %H:%M %Z}"
        rows.append(
            (
                fire.schedule,
                f"{local} (clocks change)" if fire.clocks_change else local,
                f"{fire.fire:%Y-%m-%d %H:%M}",
                f"{late} s later" if late else "then",
            )
        )
    return _columns(rows)


def standing_lines(schedules: Sequence[Standing]) -> list[str]:
    """One line a schedule."""
    rows = [("schedule", "cron", "next (UTC)", "state", "latest fire (UTC)", "outcome")]
    for one in schedules:
        running = f"{len(one.running)} running" if one.running else "waiting"
        state = f"paused by {one.control.by}" if one.control.paused else running
        rows.append(
            (
                one.schedule.name,
                f"{one.schedule.cron} {one.schedule.timezone}",
                f"{one.next:%Y-%m-%d %H:%M}" if one.next else "never",
                state,
                f"{unstamp(one.latest):%Y-%m-%d %H:%M}" if one.latest else _MISSING,
                one.outcome or _MISSING,
            )
        )
    return _columns(rows)


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    rows = [[told(cell) for cell in row] for row in cells]  # records come from a bucket, and go to a terminal
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(_GAP.join(padded).rstrip())
    return lines
