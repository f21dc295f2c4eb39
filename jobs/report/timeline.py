"""What was done where and when, read from a run's events: nodes as lanes, tasks as bars, tries that failed."""

import heapq
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runs.figures import elapsed, sized
from ..runs.results import number

_ENDS = {"finished": "done", "retry": "retried", "give_up": "failed"}
_MOST_BARS = 3000  # more are a texture that only makes the page heavy
_MOST_ROWS = 60
_WIDTH = 10_000  # bars are placed on a grid of this many columns
_UNKNOWN = "node not told"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One try of a task, in seconds since the run began. `where` is the node, empty if it was not told."""

    start: float
    end: float
    kind: str
    model: str
    outcome: str
    where: str = ""
    text: str = ""


@dataclass(kw_only=True, slots=True)
class Spent:
    """What a model took: seconds of its tasks, and how many tries failed."""

    seconds: float = 0.0
    retries: int = 0


@dataclass(kw_only=True)
class Happened:
    """What the events of a run say. Bytes are None where no event tells of any (runs of older versions)."""

    spans: list[Span] = field(default_factory=list)
    by_model: dict[str, Spent] = field(default_factory=dict)
    retries: int = 0
    task_seconds: float = 0.0
    bytes_read: float | None = None
    bytes_written: float | None = None
    ends_at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """Tasks that follow each other too closely to be told apart are one bar. Places are shares of the whole in %."""

    x: float
    width: float
    kind: str
    outcome: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A node; tasks that ran on it at the same time lie in rows below each other."""

    name: str
    rows: Sequence[Sequence[Bar]]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What the page draws. `ticks` are places in % and their labels; `left_out` counts nodes without a lane."""

    lanes: Sequence[Lane]
    kinds: Sequence[tuple[str, int, str]]
    ticks: Sequence[tuple[float, str]]
    tasks: int
    merged: bool
    left_out: int


def read_events(lines: Iterable[bytes], seconds: float, *, running: bool = False) -> Happened:
    """What happened, from lines of JSON; a line that is no event is passed over.

    `seconds` is how long the run took: a task without an end stopped with it.
    """
    found = Happened(ends_at=seconds)
    begun: dict[str, tuple[float, str]] = {}
    for line in lines:
        if b'"task"' not in line:  # states of models are in the summary, too
            continue
        event = _event(line)
        if event is None:
            continue
        at, kind, model = float(event["at_seconds"]), event["kind"], event["model"]
        found.ends_at = max(found.ends_at, at)
        task = event.get("task")
        if not isinstance(task, str):
            continue
        if kind == "started":
            begun[task] = (at, model)
        elif kind in _ENDS:
            _note(found, event, at, begun.pop(task, (at, model))[0])
    for task, (start, model) in begun.items():
        outcome = "running" if running else "unfinished"
        found.spans.append(
            Span(start=start, end=found.ends_at, kind=_kind(task), model=model, outcome=outcome)
        )
    return found


def _event(line: bytes) -> Mapping[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not all(isinstance(event.get(key), str) for key in ("kind", "model")):
        return None
    at = number(event, "at_seconds")
    return event if at is not None and 0 <= at < 1e9 else None


def _note(found: Happened, event: Mapping[str, Any], at: float, begun_at: float) -> None:
    """A try of a task has ended."""
    seconds = number(event, "seconds")
    if seconds is None or not 0 <= seconds <= at:
        seconds = at - min(begun_at, at)
    start = max(begun_at, at - seconds)  # a task waits in a queue before it begins
    spent = found.by_model.setdefault(event["model"], Spent())
    spent.seconds += seconds
    found.task_seconds += seconds
    if event["kind"] != "finished":
        spent.retries += 1
        found.retries += event["kind"] == "retry"
    for key in ("bytes_read", "bytes_written"):
        size = number(event, key)
        if size is not None and 0 <= size < math.inf:
            setattr(found, key, (getattr(found, key) or 0) + size)
    where, text = event.get("where"), event.get("text")
    found.spans.append(
        Span(
            start=min(start, at),
            end=at,
            kind=_kind(event["task"]),
            model=event["model"],
            outcome=_ENDS[event["kind"]],
            where=where if isinstance(where, str) else "",
            text=text if isinstance(text, str) else "",
        )
    )


def _kind(task: str) -> str:
    """`a/model/convert[3]` -> `convert`."""
    return task.rpartition("/")[2].partition("[")[0]


def draw(happened: Happened) -> Timeline | None:
    """The picture of it; None if no task was begun."""
    if not happened.spans:
        return None
    total = max(happened.ends_at, 1e-3)
    rows = _rows(happened.spans)
    shown, left_out = rows[:_MOST_ROWS], {name for name, _ in rows[_MOST_ROWS:]}
    gap, merged = 0, False
    while True:
        drawn = [(name, _groups(spans, total, gap)) for name, spans in shown]
        if sum(len(groups) for _, groups in drawn) <= _MOST_BARS or gap > _WIDTH:
            break
        gap, merged = max(5, gap * 2), True
    lanes: dict[str, list[Sequence[Bar]]] = {}
    for name, groups in drawn:
        lanes.setdefault(name, []).append([_bar(group, total) for group in groups])
    return Timeline(
        lanes=[Lane(name=name, rows=its) for name, its in lanes.items()],
        kinds=_totals(happened.spans),
        ticks=_ticks(total),
        tasks=len(happened.spans),
        merged=merged,
        left_out=len(left_out - lanes.keys()),
    )


def _rows(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """Spans that do not overlap, by node; without any node told, as many slots as were busy at once."""
    told = any(span.where for span in spans)
    by_lane: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end, span.model, span.kind)):
        by_lane.setdefault(span.where or (_UNKNOWN if told else ""), []).append(span)
    found = []
    for name in sorted(by_lane, key=lambda name: (name == _UNKNOWN, _natural(name))):
        packed = _packed(by_lane[name])
        found += [(name or f"slot {index}", row) for index, row in enumerate(packed, start=1)]
    return found


def _packed(spans: Sequence[Span]) -> list[list[Span]]:
    """As few rows as possible, the first one the fullest."""
    rows: list[list[Span]] = []
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for span in spans:
        while busy and busy[0][0] <= span.start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            rows.append([])
            free.append(len(rows) - 1)
        row = heapq.heappop(free)
        rows[row].append(span)
        heapq.heappush(busy, (span.end, row))
    return rows


def _natural(name: str) -> list[tuple[int, int, str]]:
    """node-2 before node-10."""
    parts = re.split(r"(\d{1,15})", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _groups(spans: Sequence[Span], total: float, gap: int) -> list[list[Span]]:
    """The bars of one row; neighbours with less than `gap` columns between them are one, unless a try of it failed."""
    groups: list[list[Span]] = []
    last_end = -1
    for span in spans:
        start, end = (round(_WIDTH * at / total) for at in (span.start, span.end))
        joins = gap and groups and start - last_end < gap and span.outcome == groups[-1][0].outcome
        if joins and (end - start < gap or span.kind == groups[-1][-1].kind):
            groups[-1].append(span)
        else:
            groups.append([span])
        last_end = end
    return groups


def _bar(group: Sequence[Span], total: float) -> Bar:
    start, end = group[0].start, group[-1].end
    seconds: dict[str, float] = {}
    for span in group:
        seconds[span.kind] = seconds.get(span.kind, 0.0) + span.end - span.start
    kind = max(seconds, key=lambda kind: seconds[kind])
    first = group[0]
    if len(group) == 1:
        title = f"{first.model}: {first.kind}, {elapsed(end - start)} from {elapsed(start)}"
        title += "" if first.outcome == "done" else f", {first.outcome}"
        title += f": {first.text}" if first.text else ""
    else:
        title = f"{len(group)} tasks, mostly {kind}, {elapsed(start)} to {elapsed(end)}"
    return Bar(
        x=round(100 * start / total, 2),
        width=max(0.05, round(100 * (end - start) / total, 2)),
        kind=kind,
        outcome=first.outcome,
        title=title if len(title) <= 300 else f"{title[:297]}...",
    )


def _totals(spans: Sequence[Span]) -> list[tuple[str, int, str]]:
    """Kinds of tasks, how many tries, and their time, in the order in which they were first begun."""
    count: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end, span.kind)):
        count[span.kind] = count.get(span.kind, 0) + 1
        seconds[span.kind] = seconds.get(span.kind, 0.0) + span.end - span.start
    return [(kind, count[kind], elapsed(seconds[kind])) for kind in count]


def _ticks(total: float) -> list[tuple[float, str]]:
    """Some five round times."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 43_200)
    step = next((step for step in steps if total / step <= 6), 86_400 * max(1, round(total / 86_400 / 5)))
    return [
        (round(100 * index * step / total, 2), _tick(index * step)) for index in range(int(total / step) + 1)
    ]


def _tick(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} s" if seconds else "0"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def traffic(read: float | None, written: float | None) -> str | None:
    """`1.2 GB read, 90 MB written`; None where nothing is known."""
    told = [
        f"{sized(size)} {what}" for size, what in ((read, "read"), (written, "written")) if size is not None
    ]
    return ", ".join(told) or None
