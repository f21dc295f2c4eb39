"""The runs of one output as a page: bytes saved over time, models by state, and the way to each run's own page."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fleetpress.storage.uri import is_s3

from ..runs.figures import (
    elapsed,
    share,
    sized,
    three_digits,
)
from ..runs.results import REPORT, RUNS
from ..runs.run_lines import RunLine
from .template import began_at, render

_STATES = ("published", "unchanged", "rejected", "failed", "running", "pending")
_DRAWN = 400  # runs; more columns are narrower than a pixel


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A run in the drawings: place and width in %, stacked parts (state, y and height in %), and its title."""

    x: float
    width: float
    parts: Sequence[tuple[str, float, float]]
    title: str
    href: str


def render_runs(
    output: str, runs: Sequence[RunLine], unread: Sequence[str] = (), page: str | None = None
) -> str:
    """The page; `page` is the file that it will lie in, from which links lead to the runs' own pages.

    Links into a bucket are relative to the output: they work where the page lies beside its folder `runs`.
    """
    drawn = runs[-_DRAWN:]
    most_saved = max((_saved(line) for line in drawn), default=0.0)
    most_models = max((sum(line.models.values()) for line in drawn), default=0)
    latest = next((line for line in reversed(runs) if line.state == "done"), runs[-1] if runs else None)
    links = {line.run: _link(output, line.run, page) for line in runs}
    states = [state for state in _STATES if any(state in line.models for line in drawn)]
    return render(
        "runs",
        output=output,
        latest=latest and _row(latest, links[latest.run]),
        rows=[_row(line, links[line.run]) for line in reversed(runs)],
        saved=[
            _saved_column(line, place, len(drawn), most_saved, links[line.run])
            for place, line in enumerate(drawn)
        ],
        states=states,
        stacked=[
            _states_column(line, place, len(drawn), most_models, links[line.run])
            for place, line in enumerate(drawn)
        ],
        saved_ticks=_ticks(most_saved, sized),
        model_ticks=_ticks(most_models, lambda value: f"{value:,.0f}", whole=True),
        dates=_dates(drawn),
        left_out=len(runs) - len(drawn),
        unread=unread,
        in_bucket=is_s3(output),
        report=REPORT,
    )


def _saved(line: RunLine) -> float:
    return max(0.0, line.bytes_before - line.bytes_after)


def _link(output: str, run: str, page: str | None) -> str:
    own = f"{RUNS}{run}/{REPORT}"
    if not is_s3(output):
        folder = output.removeprefix("file://")
        start = Path(page).absolute().parent if page else Path(folder).absolute()
        own = Path(os.path.relpath(Path(folder).absolute() / own, start)).as_posix()
    return quote(own)


def _row(line: RunLine, href: str) -> dict[str, object]:
    before, after = line.bytes_before, line.bytes_after
    return {
        "run": line.run,
        "began": began_at(line.run) or line.run,
        "name": line.name,
        "state": line.state,
        "href": href,
        "models": line.models,
        "total": sum(line.models.values()),
        "seconds": elapsed(line.seconds),
        "before": sized(before) if before else None,
        "after": sized(after) if before else None,
        "saved": sized(before - after) if before else None,
        "share": share(1 - after / before) if before else None,
        "ratio": three_digits(before / after) if after else None,
    }


def _column(
    line: RunLine, at: tuple[int, int], parts: Sequence[tuple[str, float, float]], told: str, href: str
) -> _Column:
    place, count = at
    width = 100 / max(count, 8)
    return _Column(
        x=round(place * width + 0.1 * width, 3),
        width=round(0.8 * width, 3),
        parts=parts,
        title=f"{began_at(line.run) or line.run}, {line.name}: {told}",
        href=href,
    )


def _saved_column(line: RunLine, place: int, count: int, most: float, href: str) -> _Column:
    height = round(100 * _saved(line) / (most * 1.05), 3) if most else 0.0
    told = f"{sized(_saved(line))} saved ({sized(line.bytes_before)} → {sized(line.bytes_after)})"
    return _column(line, (place, count), [("saved", round(100 - height, 3), height)], told, href)


def _states_column(line: RunLine, place: int, count: int, most: int, href: str) -> _Column:
    parts, top = [], 100.0
    for state in _STATES:
        number = line.models.get(state, 0)
        if number:
            height = 100 * number / (most * 1.05)
            top -= height
            parts.append((state, round(top, 3), round(height, 3)))
    told = (
        ", ".join(f"{line.models[state]:,} {state}" for state in _STATES if line.models.get(state))
        or "no models"
    )
    return _column(line, (place, count), parts, told, href)


def _ticks(most: float, write: object, *, whole: bool = False) -> list[tuple[float, str]]:
    """Up to five round values and where they lie in % from the top."""
    if most <= 0:
        return [(100.0, "0")]
    assert callable(write)
    power = 10.0 ** (len(f"{most:.0f}") - 1)
    steps = [power * digit for digit in (0.1, 0.2, 0.25, 0.5, 1, 2, 5) if not whole or power * digit >= 1]
    step = next((step for step in steps if most / step <= 5), steps[-1])
    return [
        (round(100 - 100 * index * step / (most * 1.05), 2), write(index * step))
        for index in range(int(most / step) + 1)
    ]


def _dates(drawn: Sequence[RunLine]) -> list[tuple[float, str]]:
    """When some of the runs began, below their columns."""
    count = len(drawn)
    width = 100 / max(count, 8)
    every = max(1, -(-count // 8))
    return [
        (round((place + 0.5) * width, 2), (began_at(line.run) or line.run)[5:16])
        for place, line in enumerate(drawn)
        if place % every == 0
    ]
