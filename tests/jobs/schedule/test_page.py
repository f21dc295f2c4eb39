"""docs/schedule.md is followed to the letter, and its tables say what the code does."""

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.schedule.file import parse_schedules

PAGE = (Path(__file__).parents[3] / "docs" / "schedule.md").read_text(encoding="utf-8")
SPEC = """\
version: 1
name: fleet
output: compressed
models: [{source: models/net.pt2, recipe: small}]
recipes: {small: {quantize: {scheme: W8A16}}}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_command_of_the_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fleetpress.jobs.cli.schedules._now", lambda: datetime(2026, 11, 30, 12, tzinfo=UTC))
    (file,) = blocks("yaml schedules.yaml")
    Path("schedules.yaml").write_text(file)
    Path("fleet.yaml").write_text(SPEC)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
        out, err = capsys.readouterr()
        assert out, command
        assert not err
    assert sorted(path.name for path in Path("units").iterdir()) == [
        "fleetpress-schedule.service",
        "fleetpress-schedule.timer",
    ]
    assert Path("compressed/schedules/nightly/control.json").exists()


def test_the_page_s_defaults_are_the_code_s() -> None:
    text = "version: 1\noutput: o\nschedules: [{name: s, spec: a, cron: '@daily'}]\n"
    (schedule,) = parse_schedules(text, "s").schedules
    assert "within `grace` (10 minutes)" in PAGE
    assert schedule.grace_seconds == 600
    assert "one day without it" in PAGE
    assert schedule.misfire_deadline_seconds == 86_400
    assert "# UTC without it" in PAGE
    assert schedule.timezone == "UTC"
