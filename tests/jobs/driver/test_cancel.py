"""Ending a run from outside: one that lives, one whose driver is dead, one that has ended, none."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.driver.cancel import Cancelled, cancel
from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.runs.heartbeat import (
    DEAD_SECONDS,
    alive_key,
    cancel_key,
)
from fleetpress.jobs.runs.results import (
    FleetResult,
    ModelResult,
    read_result,
    write_summary,
)
from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore

MODELS = (ModelResult(name="a", state="published"), ModelResult(name="b", state="running"))


def begin(store: ObjectStore, run: str, *, state: str = "running", beat: int | None = 1) -> FleetResult:
    """A run as its driver leaves it in the output; `beat` None: it shows no sign of life."""
    result = FleetResult(run=run, state=state, name="n", output=store.uri, models=MODELS)  # type: ignore[arg-type]
    write_summary(store, result)
    if beat is not None:
        store.put(alive_key(run), json.dumps({"beat": beat}).encode())
    return result


class World:
    """A clock, and a driver that does something as time goes by."""

    def __init__(self, driver: Callable[[float], None] = lambda now: None) -> None:
        self.now = 0.0
        self._driver = driver

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._driver(self.now)


def ended(store: ObjectStore, run: str | None, world: World) -> Cancelled:
    return cancel(store, run, clock=world.clock, sleep=world.sleep)


def test_a_living_run_hears_it_and_ends(store: ObjectStore) -> None:
    result = begin(store, "r")

    def driver(now: float) -> None:
        if now < 4:
            store.put(alive_key("r"), json.dumps({"beat": now}).encode())
        elif now < 6:  # it has heard, and writes its page
            assert json.loads(store.get(cancel_key("r"))) == {"cancel": "r"}
            store.delete(alive_key("r"))
        else:
            write_summary(store, FleetResult(**{**vars(result), "state": "interrupted", "seconds": 6.0}))

    world = World(driver)
    assert ended(store, None, world) == Cancelled(run="r", state="interrupted", outcome="cancelled")
    assert world.now < 10
    assert read_result(store).seconds == 6.0
    assert list(store.sizes("runs/")) == ["runs/r/summary.json"]


def test_a_busy_driver_is_not_waited_for_without_end(store: ObjectStore) -> None:
    begin(store, "r")
    world = World(lambda now: store.put(alive_key("r"), json.dumps({"beat": now}).encode()) and None)
    assert ended(store, None, world) == Cancelled(run="r", state="running", outcome="asked")
    assert world.now < 60
    assert read_result(store).state == "running"
    assert cancel_key("r") in store.sizes("runs/")


def test_a_dead_driver_is_told_and_its_run_is_over(store: ObjectStore) -> None:
    begin(store, "r")
    world = World()
    assert ended(store, None, world) == Cancelled(run="r", state="interrupted", outcome="dead")
    assert DEAD_SECONDS <= world.now < DEAD_SECONDS + 5
    after = read_result(store)
    assert (after.state, after.models) == ("interrupted", MODELS)
    assert b'class="badge interrupted"' in store.get("runs/r/report.html")
    assert alive_key("r") not in store.sizes("runs/")


def test_a_driver_that_died_on_this_machine_is_not_waited_for(store: ObjectStore) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    begin(store, "r", beat=None)
    sign = {"beat": 1, "host": socket.gethostname(), "process": gone.pid}
    store.put(alive_key("r"), json.dumps(sign).encode())
    world = World()
    assert ended(store, None, world).outcome == "dead"
    assert world.now == 0
    assert gone.pid != os.getpid()


def test_a_driver_that_vanished_between_its_sign_and_its_summary(store: ObjectStore) -> None:
    begin(store, "r", beat=None)
    world = World()
    assert ended(store, None, world) == Cancelled(run="r", state="interrupted", outcome="dead")
    assert 5 < world.now < 15  # it might still have written its last words


@pytest.mark.parametrize("run", [None, "r"])
@pytest.mark.parametrize("state", ["done", "interrupted"])
def test_nothing_to_cancel(store: ObjectStore, run: str | None, state: str) -> None:
    begin(store, "r", state=state, beat=None)
    before = store.sizes()
    assert ended(store, run, World()) == Cancelled(run="r", state=state, outcome="over")  # type: ignore[arg-type]
    assert store.sizes() == before


def test_the_one_that_is_under_way_is_meant(store: ObjectStore) -> None:
    begin(store, "20260101", beat=1)
    begin(store, "20260102", state="done", beat=1)  # its sign stayed behind
    begin(store, "20260103", state="done", beat=None)
    assert ended(store, None, World()).run == "20260101"
    begin(store, "20260104", beat=1)
    begin(store, "20260105", beat=1)
    with pytest.raises(UsageError, match="under way: 20260104, 20260105; name one"):
        ended(store, None, World())
    assert ended(store, "20260105", World()).run == "20260105"


def test_no_such_run(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFound, match="holds no runs"):
        ended(store, None, World())
    begin(store, "r")
    with pytest.raises(ObjectNotFound, match="holds no run 'x'; the latest are: r"):
        ended(store, "x", World())
    assert cancel_key("x") not in store.sizes("runs/")


def test_the_verb(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store, "r", state="done", beat=None)
    assert main(["cancel", store.uri]) == 0
    assert capsys.readouterr().out == "run r: done; had ended before\n"
    assert main(["cancel", store.uri, "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "r", "state": "done", "outcome": "over"}
    assert main(["cancel", store.uri, "x"]) == 2


def test_status_says_when_nobody_works(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store, "r", beat=1)
    assert main(["status", store.uri]) == 0
    assert capsys.readouterr().err == ""
    begin(store, "s", beat=None)
    assert main(["status", store.uri, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["state"] == "running"
    assert "run s shows no sign of life" in printed.err
    begin(store, "t", state="done", beat=None)
    assert main(["status", store.uri]) == 0
    assert capsys.readouterr().err == ""


def test_report_of_a_run_that_goes_on(
    store: ObjectStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    begin(store, "r")
    assert main(["report", store.uri]) == 0
    assert "its page comes at its end" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert main(["report", store.uri, "--html", str(page)]) == 0
    assert capsys.readouterr().err == f"report: {page}\n"
    assert "it is still running" in page.read_text()
