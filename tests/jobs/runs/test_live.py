"""A run as it is told on stderr: lines in a log, a display on a terminal."""

import contextlib
import io
import json
import time
from collections.abc import Iterator

import pytest

from fleetpress.jobs.runs.events import Event
from fleetpress.jobs.runs.live import Live
from fleetpress.jobs.runs.log_lines import written_as
from fleetpress.jobs.runs.progress import Progress
from fleetpress.jobs.runs.results import ModelResult

STATES = {"lenet5": "running", "mlp": "running", "gpt": "pending", "old": "unchanged"}


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Four models, 12.34 seconds after the start."""
    made = Progress(run="r", started=time.monotonic())
    monkeypatch.setattr(Progress, "seconds", 12.34)
    made.noted_at_seconds = 12.34
    for name, state in STATES.items():
        made.set(ModelResult(name=name, state=state))  # type: ignore[arg-type]
    return made


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 x 30; a test makes it stderr itself, after pytest has put its own capture there."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    return Terminal()


@contextlib.contextmanager
def live_on(terminal: Terminal) -> Iterator[Live]:
    with contextlib.redirect_stderr(terminal), Live(title="nightly") as live:
        yield live


def shown_within(terminal: Terminal, text: str, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while text not in terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.02)
    return text in terminal.getvalue()


def tell(live: Live, progress: Progress, kind: str, model: str, task: str | None = None) -> None:
    """As a journal does it."""
    event = Event(kind=kind, model=model, task=task and f"{model}/{task}", step=task or "")
    progress.note(event, progress.seconds)
    live.update(event, progress)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Event(kind="started", model="lenet5", task="lenet5/prune"), "12.3s lenet5 prune started"),
        (
            Event(kind="finished", model="lenet5", task="lenet5/prune", seconds=0.44),
            "12.3s lenet5 prune finished (0.4 s)",
        ),
        (
            Event(kind="retry", model="mlp", task="mlp/collect[1]", text="the server\ndoes not answer"),
            "12.3s mlp collect[1] is tried again: the server does not answer",
        ),
        (
            Event(kind="give_up", model="mlp", task="mlp/train", text="loss became NaN"),
            "12.3s mlp train given up: loss became NaN",
        ),
        (Event(kind="published", model="lenet5"), "12.3s lenet5 published"),
    ],
    ids=lambda value: value.kind if isinstance(value, Event) else "",
)
def test_lines_in_a_log(
    event: Event, line: str, progress: Progress, capsys: pytest.CaptureFixture[str]
) -> None:
    with Live(title="nightly") as live:
        live.update(event, progress)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", line + "\n")


def test_json_lines_even_on_a_terminal(terminal: Terminal, progress: Progress) -> None:
    event = Event(kind="finished", model="lenet5", task="lenet5/prune", step="prune", seconds=0.44)
    with written_as("json"), live_on(terminal) as live:
        live.update(event, progress)
    [line] = terminal.getvalue().splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("Z")
    assert told == {
        "at_seconds": 12.34,
        "run": "r",
        "kind": "finished",
        "model": "lenet5",
        "task": "lenet5/prune",
        "step": "prune",
        "seconds": 0.44,
    }


def test_a_terminal_shows_what_runs(
    terminal: Terminal, progress: Progress, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = (("lenet5", "train"), ("lenet5", "collect[0]"), ("lenet5", "collect[1]"), ("mlp", "prune"))
    progress.tasks, progress.left = 9, {"train": 3, "collect": 2}
    with live_on(terminal) as live:
        for model, task in tasks:
            tell(live, progress, "started", model, task)
        tell(live, progress, "finished", "lenet5", "train")
        assert shown_within(terminal, "1 of 4 models")
        shown_first = terminal.getvalue()
        tell(live, progress, "give_up", "mlp", "prune")
        progress.set(ModelResult(name="mlp", state="failed"))
        tell(live, progress, "failed", "mlp")
        assert shown_within(terminal, "2 of 4 models")
    assert "2 running, 1 pending, 1 unchanged" in shown_first
    assert "4 of 9 tasks" in shown_first
    assert "collect[0] 0.0 s, collect[1] 0.0 s" in shown_first
    assert "prune 0.0 s" in shown_first
    assert "train" not in shown_first
    later = terminal.getvalue().removeprefix(shown_first)
    assert "1 running, 1 pending, 1 unchanged, 1 failed" in later
    assert "prune" not in later
    assert capsys.readouterr() == ("", "")


def test_the_cursor_is_back_after_an_error(terminal: Terminal) -> None:
    with pytest.raises(KeyError), live_on(terminal):
        raise KeyError("ours")
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l") >= 0


def test_events_are_cheap(terminal: Terminal, progress: Progress) -> None:
    event = Event(kind="started", model="lenet5", task="lenet5/train")
    with live_on(terminal) as live:
        begin = time.process_time()
        for _ in range(2000):
            live.update(event, progress)
        seconds = time.process_time() - begin
    assert seconds / 2000 < 0.001
