"""docs/watching.md names every field and every kind of a line."""

import re
from dataclasses import fields
from pathlib import Path

from fleetpress.jobs.runs.events import (
    MODEL_OVER,
    TASK_OVER,
    Event,
)
from fleetpress.jobs.runs.results import Standing

TEXT = (Path(__file__).parents[3] / "docs" / "watching.md").read_text(encoding="utf-8")


def named(part: str) -> set[str]:
    """What stands in code quotes in the first column of a table."""
    table = TEXT.partition(part)[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    return {word for row in rows for word in re.findall(r"`(\w+)`", row)}


def test_every_field_of_an_event() -> None:
    own = {field.name for field in fields(Event)}
    assert own | {"time", "run", "at_seconds"} <= named("| field | in | meaning |")


def test_every_kind() -> None:
    kinds = {*TASK_OVER, *MODEL_OVER, "started", "waiting", "progress", "message", "log"}
    assert named("| `kind` | what happened |") == kinds


def test_every_field_of_the_tasks_of_a_summary() -> None:
    assert named("| field of `status --json` | meaning |") == {field.name for field in fields(Standing)}
