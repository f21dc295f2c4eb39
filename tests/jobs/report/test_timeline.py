"""Events as lanes of workers: places, tries, merging, and lines that are no events."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from example_fleets import events, fleet

from fleetpress.jobs.report.timeline import Happened, draw, read_events, traffic


def line(at: float, kind: str, task: str = "m/train", **more: Any) -> bytes:
    told = {"at_seconds": at, "kind": kind, "model": task.rpartition("/")[0], "task": task, **more}
    return json.dumps(told).encode()


def test_tasks_of_told_workers() -> None:
    found = read_events(
        [
            line(0, "started"),
            line(5, "finished", seconds=4, where="node-10", bytes_read=7, bytes_written=1),
            line(5, "started", "m/prune"),
            line(6, "finished", "m/prune", seconds=1, where="node-2", bytes_read=3),
        ],
        10.0,
    )
    assert [(span.start, span.end, span.kind, span.where) for span in found.spans] == [
        (1.0, 5.0, "train", "node-10"),
        (5.0, 6.0, "prune", "node-2"),
    ]
    assert (found.bytes_read, found.bytes_written) == (10, 1)
    assert found.task_seconds == 5.0
    drawn = draw(found)
    assert drawn is not None
    assert [lane.name for lane in drawn.lanes] == ["node-2", "node-10"]
    bar = drawn.lanes[1].rows[0][0]
    assert (bar.x, bar.width, bar.kind, bar.outcome) == (10.0, 40.0, "train", "done")
    assert bar.title == "m: train, 4.0 s from 1.0 s"
    assert drawn.kinds == [("train", 1, "4.0 s"), ("prune", 1, "1.0 s")]


def test_without_workers_there_are_as_many_slots_as_were_busy_at_once() -> None:
    found = read_events(
        [
            line(0, "started", "a/train"),
            line(0, "started", "b/train"),
            line(4, "finished", "a/train"),
            line(4, "started", "c/train"),
            line(6, "finished", "b/train"),
            line(8, "finished", "c/train"),
        ],
        8.0,
    )
    drawn = draw(found)
    assert drawn is not None
    assert [lane.name for lane in drawn.lanes] == ["slot 1", "slot 2"]
    assert sum(len(row) for lane in drawn.lanes for row in lane.rows) == 3


def test_tasks_of_one_worker_at_the_same_time_lie_below_each_other() -> None:
    found = read_events(
        [
            line(0, "started", "a/train"),
            line(0, "started", "b/train"),
            line(4, "finished", "a/train", where="node"),
            line(4, "finished", "b/train", where="node"),
        ],
        4.0,
    )
    drawn = draw(found)
    assert drawn is not None
    assert [len(lane.rows) for lane in drawn.lanes] == [2]


def test_tries_that_failed_and_tasks_that_never_ended() -> None:
    told = [
        line(0, "started"),
        line(2, "retry", text="the worker is gone"),
        line(3, "started"),
        line(4, "give_up", text="again"),
        line(4, "started", "m/convert[3]"),
    ]
    found = read_events(told, 10.0)
    assert [(span.kind, span.end, span.outcome) for span in found.spans] == [
        ("train", 2.0, "retried"),
        ("train", 4.0, "failed"),
        ("convert", 10.0, "unfinished"),
    ]
    assert found.retries == 1
    assert found.by_model["m"].retries == 2
    assert read_events(told, 10.0, running=True).spans[-1].outcome == "running"


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"{",
        b'"task"',
        b'{"task": 1}',
        b'{"at_seconds": "1", "kind": "started", "model": "m", "task": "m/train"}',
        b'{"at_seconds": NaN, "kind": "started", "model": "m", "task": "m/train"}',
        b'{"at_seconds": -1, "kind": "started", "model": "m", "task": "m/train"}',
        b'{"at_seconds": 1e300, "kind": "started", "model": "m", "task": "m/train"}',
        b'{"at_seconds": 1, "kind": [], "model": "m", "task": "m/train"}',
        b'{"at_seconds": 1, "kind": "finished", "model": {}, "task": "m/train"}',
        b'{"at_seconds": 1, "kind": "finished", "model": "m", "task": []}',
        b'"task"' + b"[" * 100_000,
        b'\xff"task"',
    ],
)
def test_lines_that_are_no_events_are_passed_over(bad: bytes) -> None:
    assert read_events([bad], 1.0).spans == []


@pytest.mark.parametrize("seconds", [-1, 1e9, "x", None, True, float("nan"), float("inf")])
def test_seconds_that_cannot_be_leave_the_time_between_the_events(seconds: object) -> None:
    found = read_events([line(1, "started"), line(3, "finished", seconds=seconds)], 5.0)
    assert (found.spans[0].start, found.spans[0].end) == (1.0, 3.0)
    assert found.task_seconds == 2.0


def test_very_many_tasks_become_few_bars() -> None:
    result = fleet(4000)
    drawn = draw(read_events(events(result), result.seconds))
    assert drawn is not None
    bars = [bar for lane in drawn.lanes for row in lane.rows for bar in row]
    assert drawn.merged
    assert drawn.tasks > 10_000
    assert 500 < len(bars) <= 3000
    assert any(bar.outcome == "failed" for bar in bars), "a failed try is never drawn over"
    assert len(drawn.ticks) <= 7


def test_very_many_workers_are_not_all_drawn() -> None:
    told = [
        line(index, "finished", f"m{index}/train", seconds=1, where=f"w{index}") for index in range(1, 200)
    ]
    drawn = draw(read_events(told, 200.0))
    assert drawn is not None
    assert len(drawn.lanes) == 60
    assert drawn.left_out == 139


@pytest.mark.parametrize("seconds", [0.05, 0.9, 14, 93, 250, 7000, 90_000, 4e6])
def test_a_handful_of_round_times(seconds: float) -> None:
    told = [line(0, "started"), line(seconds, "finished", seconds=seconds)]
    drawn = draw(read_events(told, seconds))
    assert drawn is not None
    assert drawn.ticks[0] == (0.0, "0")
    assert len(drawn.ticks) <= 8
    assert all(len(label) <= 12 for _, label in drawn.ticks)


def test_nothing_happened() -> None:
    assert draw(Happened()) is None
    assert draw(read_events([], 3.0)) is None
    assert traffic(None, None) is None
    assert traffic(1e9, None) == "1.00 GB read"
