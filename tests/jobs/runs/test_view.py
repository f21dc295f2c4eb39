"""How a run that is under way is shown."""

import io

import pytest
from rich.console import Console

from fleetpress.jobs.runs.results import RunningTask, Standing
from fleetpress.jobs.runs.view import (
    Rates,
    View,
    drawn,
    words,
)

TASKS = (
    RunningTask(model="lenet5", task="collect[0]", seconds=3.0),
    RunningTask(model="lenet5", task="collect[1]", seconds=65.0),
    RunningTask(model="gpt\x1b[2J", task="convert[7]", seconds=0.5),
)
STANDING = Standing(
    executor="ray",
    tasks_total=40,
    tasks_left=28,
    tasks_running=3,
    running=TASKS,
    retries=1,
    bytes_read=12_300_000,
    bytes_written=999,
    seconds_left=187.0,
)
VIEW = View(
    title="nightly",
    seconds=75.0,
    counts={"running": 2, "pending": 1, "published": 1, "failed": 0},
    standing=STANDING,
    rates=(1_500_000.0, 13.3),
)


def text_of(view: View, *, lines: int = 30) -> str:
    console = Console(file=io.StringIO(), width=120, height=lines, record=True, color_system=None)
    console.print(drawn(view, console))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_a_run_on_a_terminal() -> None:
    first, *rest = text_of(VIEW).splitlines()
    assert first.startswith("nightly")
    assert first.endswith("1 of 4 models 1 min 15 s")
    assert rest == [
        "2 running, 1 pending, 1 published",
        "12 of 40 tasks, 12.3 MB read (1.50 MB/s), 999 B written (13.3 B/s), 1 retry, about 3 min left",
        "  lenet5   collect[0] 3.0 s, collect[1] 1 min 05 s",
        "  gpt?[2J  convert[7] 0.5 s",
    ]


def test_the_same_in_a_log() -> None:
    assert words(VIEW) == (
        "75.0s 1 of 4 models, 12 of 40 tasks, 12.3 MB read (1.50 MB/s), 999 B written (13.3 B/s), 1 retry, "
        "about 3 min left"
    )


def test_trouble_is_shown() -> None:
    view = View(title="t", seconds=1.0, counts={"pending": 1}, trouble="no sign of life for 11 s")
    assert "no sign of life for 11 s" in text_of(view)
    assert words(view) == "1.0s 0 of 1 models, no sign of life for 11 s"


def test_more_models_than_lines() -> None:
    tasks = tuple(RunningTask(model=f"m{index}", task="train", seconds=1.0) for index in range(50))
    view = View(
        title="t", seconds=1.0, counts={"running": 300}, standing=Standing(running=tasks, tasks_running=300)
    )
    shown = text_of(view, lines=10)
    assert "  m3  train" in shown
    assert "  m4 " not in shown
    assert shown.endswith("and 296 more tasks")


@pytest.mark.parametrize(
    ("seconds", "is_least", "told"),
    [
        (0.2, False, "about 1 s left"),
        (7.4, False, "about 7 s left"),
        (33.0, False, "about 35 s left"),
        (61.0, True, "more than 1 min left"),
        (7500.0, False, "about 2 h 05 min left"),
    ],
)
def test_the_time_left_has_no_more_digits_than_it_is_worth(seconds: float, is_least: bool, told: str) -> None:
    standing = Standing(tasks_total=2, tasks_left=1, seconds_left=seconds, seconds_left_is_least=is_least)
    assert words(View(title="t", seconds=1.0, counts={}, standing=standing)).endswith(told)


def test_rates_are_those_of_the_last_minute() -> None:
    rates = Rates()
    assert rates.see(0.0, Standing()) == (0.0, 0.0)
    assert rates.see(10.0, Standing(bytes_read=1000, bytes_written=100)) == (100.0, 10.0)
    assert rates.see(20.0, Standing(bytes_read=1000, bytes_written=100)) == (50.0, 5.0)
    assert rates.see(60.0, Standing(bytes_read=4000, bytes_written=100)) == pytest.approx(
        (66.67, 1.67), abs=0.01
    )
    assert rates.see(80.0, Standing(bytes_read=4000, bytes_written=100)) == pytest.approx(
        (42.86, 0.0), abs=0.01
    )
    assert rates.see(500.0, Standing(bytes_read=4000, bytes_written=100)) == (0.0, 0.0)
