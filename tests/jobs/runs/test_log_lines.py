"""Lines on stderr, as words and as JSON."""

import json
import logging

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.runs import log_lines
from fleetpress.jobs.runs.events import Event

RECORD = logging.LogRecord("x", logging.WARNING, "f", 1, "%s is\nslow", ("it",), None)


def test_words(capsys: pytest.CaptureFixture[str]) -> None:
    log_lines.say("hello")
    log_lines.tell(Event(kind="published", model="a"), run="r", at_seconds=1.0)
    log_lines.report("2.0s 1 of 1 models", run="r", at_seconds=2.0, models={})
    assert capsys.readouterr() == ("", "hello\n1.0s a published\n2.0s 1 of 1 models\n")
    assert log_lines.Formatter().format(RECORD) == "WARNING it is\nslow"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    with log_lines.written_as("json"):
        log_lines.say("hello")
        log_lines.tell(Event(kind="published", model="a"), run="r", at_seconds=1.0)
        log_lines.report("2.0s 1 of 1 models", run="r", at_seconds=2.0, models={"published": 1})
        logged = log_lines.Formatter().format(RECORD)
    lines = [json.loads(line) for line in [*capsys.readouterr().err.splitlines(), logged]]
    assert all(line.pop("time")[10] == "T" for line in lines)
    assert lines == [
        {"kind": "message", "text": "hello"},
        {"kind": "published", "model": "a", "run": "r", "at_seconds": 1.0},
        {"kind": "progress", "run": "r", "at_seconds": 2.0, "models": {"published": 1}},
        {"kind": "log", "level": "warning", "text": "it is\nslow"},
    ]
    assert not log_lines.is_json()


def test_errors_of_the_command_line_are_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such.yaml", "--log-format", "json"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["kind"], "no-such.yaml" in told["text"]) == ("message", True)
    assert main(["run", "no-such.yaml"]) == 2
    assert capsys.readouterr().err.startswith("fleetpress: ")
