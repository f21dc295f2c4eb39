"""`status --watch`: a run that was started elsewhere, seen from its bucket alone."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.runs.heartbeat import alive_key
from fleetpress.jobs.runs.log_lines import written_as
from fleetpress.jobs.runs.results import (
    FleetResult,
    ModelResult,
    RunningTask,
    write_summary,
)
from fleetpress.jobs.runs.watching import Watcher
from fleetpress.storage.errors import ObjectNotFound, StoreUnreachable
from fleetpress.storage.local import FolderStore
from fleetpress.storage.store import ObjectStore


def fleet(*states: str, state: str = "running", seconds: float = 5.0, **standing: Any) -> FleetResult:
    models = tuple(
        ModelResult(name=f"m{index}", state=name, reason="why" if name == "failed" else None)  # type: ignore[arg-type]
        for index, name in enumerate(states)
    )
    return FleetResult(
        run="r1",
        state=state,
        name="fleet",
        output="o",
        models=models,
        seconds=seconds,
        **standing,  # type: ignore[arg-type]
    )


class Elsewhere:
    """A run that goes on whenever the watcher sleeps: `steps` are done one after the other, the last one for ever."""

    def __init__(self, store: ObjectStore, *steps: Callable[[], None]) -> None:
        self.store = store
        self.now = 100.0
        self.sleeps: list[float] = []
        self._steps = list(steps)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert len(self.sleeps) < 1000
        self.sleeps.append(seconds)
        self.now += seconds
        if self._steps:
            (self._steps.pop(0) if len(self._steps) > 1 else self._steps[0])()

    def watcher(self, store: ObjectStore | None = None) -> Watcher:
        return Watcher(store or self.store, clock=self.clock, sleep=self.sleep)

    def beat(self) -> None:
        self.store.put(alive_key("r1"), json.dumps({"beat": self.now}).encode())

    def writes(self, result: FleetResult) -> Callable[[], None]:
        def step() -> None:
            self.beat()
            write_summary(self.store, result)

        return step


@pytest.fixture
def elsewhere(store: ObjectStore) -> Elsewhere:
    made = Elsewhere(store)
    made.writes(fleet("running", "pending", "pending"))()
    return made


def test_a_run_is_followed_to_its_end(elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
    over = fleet("published", "failed", "published", state="done", seconds=9.0)
    elsewhere._steps = [
        elsewhere.writes(fleet("published", "running", "pending", tasks_total=9, tasks_left=6, seconds=7.0)),
        elsewhere.beat,
        elsewhere.writes(over),
    ]
    assert elsewhere.watcher().follow() == over
    assert elsewhere.sleeps == [2.0] * 3
    assert capsys.readouterr().err.splitlines() == [
        "5.0s 0 of 3 models",
        "7.0s m0 published",
        "9.0s m1 failed: why",
        "9.0s m2 published",
    ]


def test_the_same_as_json(elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere._steps = [elsewhere.writes(fleet("failed", state="done", tasks_total=3, bytes_read=7))]
    with written_as("json"):
        elsewhere.watcher().follow()
    first, last = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["kind"], first["run"], first["at_seconds"]) == ("progress", "r1", 5.0)
    assert first["models"] == {"running": 1, "pending": 2}
    assert (last["kind"], last["model"], last["text"], last["run"]) == ("failed", "m0", "why", "r1")


def test_a_run_that_was_over_before_is_told_at_once(store: ObjectStore) -> None:
    write_summary(store, fleet("published", state="done"))
    elsewhere = Elsewhere(store)
    assert elsewhere.watcher().follow().exit_code == 0
    assert elsewhere.sleeps == []


def test_progress_is_told_now_and_then(elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere._steps = [elsewhere.beat] * 40 + [elsewhere.writes(fleet("published", state="done"))]
    elsewhere.watcher().follow()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["5.0s 0 of 3 models", "35.0s 0 of 3 models", "65.0s 0 of 3 models", "5.0s m0 published"]


def test_no_sign_of_life_is_said_and_ends_it_after_a_minute(
    elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere._steps = [lambda: None]
    result = elsewhere.watcher().follow()
    assert result.state == "running"
    assert 60 < sum(elsewhere.sleeps) < 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "5.0s 0 of 3 models"
    assert lines[1].endswith("no sign of life for 20 s")
    assert len(lines) == 3
    assert lines[2].endswith("no sign of life for 50 s")


def test_a_driver_that_came_back_is_followed_on(
    elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]
) -> None:
    over = fleet("published", state="done")
    elsewhere._steps = [*[lambda: None] * 20, elsewhere.beat, lambda: None, elsewhere.writes(over)]
    assert elsewhere.watcher().follow() == over
    assert "no sign of life" in capsys.readouterr().err


def test_the_last_words_of_a_run_that_beats_no_more(elsewhere: Elsewhere) -> None:
    over = fleet("published", state="done")

    def end() -> None:
        elsewhere.store.delete(alive_key("r1"))

    elsewhere._steps = [end, lambda: None, lambda: write_summary(elsewhere.store, over)]
    assert elsewhere.watcher().follow() == over


class Troubled(FolderStore):
    """A folder that does not answer while a test says so, and counts what is asked."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.is_gone = False
        self.asked: Counter[str] = Counter()

    def head(self, key: str) -> Any:
        self._ask("head")
        return super().head(key)

    def get(self, key: str, **options: Any) -> bytes:
        self._ask("get")
        return super().get(key, **options)

    def _ask(self, what: str) -> None:
        self.asked[what] += 1
        if self.is_gone:
            raise StoreUnreachable("no answer")


@pytest.fixture
def troubled(tmp_path: Any) -> Troubled:
    return Troubled(str(tmp_path / "troubled"))


def test_a_store_that_is_gone_for_a_while(troubled: Troubled, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = Elsewhere(troubled)
    elsewhere.writes(fleet("running"))()
    over = elsewhere.writes(fleet("published", state="done"))

    def gone() -> None:
        troubled.is_gone = len(elsewhere.sleeps) < 20
        if not troubled.is_gone:
            over()

    elsewhere._steps = [gone]
    assert elsewhere.watcher().follow().exit_code == 0
    assert "the store does not answer: no answer" in capsys.readouterr().err


def test_a_store_that_stays_away_ends_it(troubled: Troubled) -> None:
    elsewhere = Elsewhere(troubled)
    elsewhere.writes(fleet("running"))()
    elsewhere._steps = [lambda: setattr(troubled, "is_gone", True)]
    with pytest.raises(StoreUnreachable):
        elsewhere.watcher().follow()
    assert 60 < sum(elsewhere.sleeps) < 70


def test_a_look_is_few_requests_however_large_the_fleet_is(troubled: Troubled) -> None:
    elsewhere = Elsewhere(troubled)
    elsewhere.writes(fleet(*["running"] * 10_000))()
    elsewhere._steps = [elsewhere.beat] * 10 + [
        elsewhere.writes(fleet(*["published"] * 10_000, state="done"))
    ]
    watcher = elsewhere.watcher()
    troubled.asked.clear()
    assert len(watcher.follow().models) == 10_000
    looks = len(elsewhere.sleeps)
    assert troubled.asked["head"] <= looks
    assert troubled.asked["get"] <= looks + 2  # signs of life, and two summaries


def test_a_summary_grows_older_on_the_screen(elsewhere: Elsewhere) -> None:
    running = (RunningTask(model="m0", task="train", seconds=1.0),)
    write_summary(elsewhere.store, fleet("running", running=running, tasks_running=1, seconds_left=10.0))
    watcher = elsewhere.watcher()
    elsewhere.now += 4
    view = watcher.view()
    assert (view.seconds, view.standing.running[0].seconds, view.standing.seconds_left) == (9.0, 5.0, 6.0)
    assert view.title == "fleet r1"


def test_there_must_be_a_run(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFound, match="holds no runs"):
        Watcher(store)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_run(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    elsewhere._steps = [
        elsewhere.writes(fleet("published", "failed", state="done", tasks_total=4, tasks_left=1))
    ]
    with contextlib.redirect_stderr(terminal):
        elsewhere.watcher().follow()
    shown = terminal.getvalue()
    assert "fleet r1" in shown
    assert "2 of 2 models" in shown
    assert "3 of 4 tasks" in shown
    assert "m0 published" not in shown  # lines are for logs


def test_ctrl_c_ends_the_watching_and_not_the_run(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_self: Watcher) -> FleetResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(Watcher, "follow", interrupted)
    assert main(["status", elsewhere.store.uri, "--watch"]) == 130
    assert capsys.readouterr() == ("", "watched no longer; the run goes on\n")
