"""`fleetpress schedule ...`: what each verb prints, for people and for scripts, and what it leaves with."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.schedule.file import load_schedules
from fleetpress.jobs.schedule.overview import next_fires
from fleetpress.jobs.schedule.tables import next_lines

FILE = """\
version: 1
output: "{place}/output"
schedules:
  - {{name: nightly, spec: fleet.yaml, cron: "30 2 * * *", timezone: Europe/Berlin, jitter: 10min}}
  - {{name: always, spec: fleet.yaml, cron: "* * * * *", concurrency: allow}}
"""
SPEC = """\
version: 1
name: f
output: o
models: [{source: a.pt2, recipe: r}]
recipes: {r: {quantize: {scheme: W4A16}}}
"""


class Begun:
    """Begins nothing, and remembers."""

    def __init__(self) -> None:
        self.jobs: list[str] = []

    def launch(self, _spec: str, job_id: str) -> None:
        self.jobs.append(job_id)

    def state(self, _job_id: str) -> str:
        return "running"


NOON = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetpress.jobs.cli.schedules._now", lambda: NOON)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "fleet.yaml").write_text(SPEC)
    path = tmp_path / "schedules.yaml"
    path.write_text(FILE.format(place=tmp_path))
    return str(path)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    """No process is started in these tests."""
    launcher = Begun()
    monkeypatch.setattr("fleetpress.jobs.schedule.local_jobs.LocalLauncher", lambda *_a, **_k: launcher)
    return launcher


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """What a verb prints for scripts."""
    assert main(["schedule", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["schedule", *words]) == code
    return capsys.readouterr().out


def test_validate(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "validate", file) == {"file": file, "ok": True, "schedules": 2, "problems": []}
    assert "2 schedules, and the specs of all are right" in printed(capsys, "validate", file)
    Path(file).with_name("fleet.yaml").write_text(SPEC.replace("W4A16", "W5A15"))
    problems = told(capsys, "validate", file, code=2)["problems"]
    assert len(problems) == 1
    assert "W5A15" in problems[0]
    Path(file).write_text("version: 1\n")
    assert "output: is missing" in printed(capsys, "validate", file, code=2)


def test_next(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    fires = told(capsys, "next", file, "-n", "3")
    assert [fire["schedule"] for fire in fires] == ["nightly"] * 3 + ["always"] * 3
    assert all(fire["local"][11:16] == "02:30" for fire in fires[:3])
    assert fires[0]["release"] >= fires[0]["fire"]
    assert len(printed(capsys, "next", file).splitlines()) == 11
    assert main(["schedule", "next", file, "-n", "0"]) == 2


def test_days_on_which_clocks_change_are_marked(file: str) -> None:
    nightly = load_schedules(file).schedules[0]
    fires = list(next_fires(nightly, datetime(2026, 3, 27, 12, tzinfo=UTC), 3))
    assert [fire.clocks_change for fire in fires] == [False, True, False]
    assert "Sun 2026-03-29 03:00 CEST (clocks change)  2026-03-29 01:00" in next_lines(fires)[2]
    (fire,) = next_fires(nightly, datetime(2026, 10, 24, 12, tzinfo=UTC), 1)
    assert fire.clocks_change


def test_tick_list_pause_resume(file: str, begun: Begun, capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys, "tick", file, "--only", "always")["rows"]
    assert [row["action"] for row in rows] == ["begun"]
    assert begun.jobs == [rows[0]["job"]]
    assert main(["schedule", "tick", file, "--quiet", "--only", "nightly"]) == 0
    assert capsys.readouterr() == ("", "")
    paused = told(capsys, "pause", file, "always")
    assert paused["paused"]
    assert "@" in paused["by"]
    nightly, always = told(capsys, "list", file)
    assert (nightly["paused"], always["paused"]) == (False, True)
    assert always["running"] == begun.jobs
    assert always["outcome"] == "begun"
    assert always["next"] > always["latest"]
    lines = printed(capsys, "list", file).splitlines()
    assert "paused by" in lines[2]
    assert printed(capsys, "resume", file, "always").startswith("always: not paused (by ")
    assert main(["schedule", "pause", file, "alway"]) == 2
    assert "did you mean `always`?" in capsys.readouterr().err


def test_run_ticks_until_it_is_interrupted(
    file: str, begun: Begun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["schedule", "run", file]) == 130
    assert slept == [30.0] * 3
    assert len(begun.jobs) == 1
    out, err = capsys.readouterr()
    assert begun.jobs[0] in out
    assert "Ctrl-C ends this, and none of their jobs" in err


def test_export(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"schedule tick --quiet {file}" in printed(capsys, "export", file, "--to", "crontab")
    files = told(capsys, "export", file, "--to", "systemd")
    assert files.keys() == {"fleetpress-schedule.service", "fleetpress-schedule.timer"}
    written = printed(capsys, "export", file, "--to", "systemd", "--into", str(tmp_path / "units")).split()
    assert [Path(path).read_text() for path in written] == list(files.values())
    assert main(["schedule", "export", file, "--to", "kuberay"]) == 2
    assert "--image" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["validate", "list", "next", "tick", "run", "export --to crontab"])
def test_a_file_that_is_not_there_is_told_of(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *options = verb.split()
    assert main(["schedule", name, "/nowhere/s.yaml", *options]) == 2
    captured = capsys.readouterr()
    assert "/nowhere/s.yaml: cannot be read" in captured.out + captured.err


def test_foreground_needs_a_name(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "tick", file, "--foreground"]) == 2
    assert "--only NAME" in capsys.readouterr().err
