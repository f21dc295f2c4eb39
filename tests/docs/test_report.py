"""The page about the report is followed after two runs, as it says, and what it says of their pages is true."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fleetpress.jobs.report.layers import MOST_LAYERS
from fleetpress.jobs.runs.results import (
    DETAILED,
    FleetResult,
    ModelResult,
    write_summary,
)
from fleetpress.storage.store import open_store

PAGE = Path(__file__).parents[2] / "docs" / "report.md"


def test_read_the_report(reader: Any) -> None:
    someone = reader()
    output = str(someone.place / "fleetpress-demo" / "output")
    model = ModelResult(name="cnn", state="published", digest="d", before={"bytes": 100}, after={"bytes": 10})
    first = FleetResult(
        run="20260101T020000000Z-aaaaaa", state="done", name="demo", output=output, models=(model,)
    )
    for result in (first, replace(first, run="20260102T020000000Z-bbbbbb")):
        write_summary(open_store(output), result)
    someone.follow("report.md")
    page = (someone.place / "report.html").read_text(encoding="utf-8")
    assert "20260102T020000000Z-bbbbbb" in page
    runs = (someone.place / "runs.html").read_text(encoding="utf-8")
    assert 'href="fleetpress-demo/output/runs/20260101T020000000Z-aaaaaa/report.html"' in runs


def test_its_numbers_are_those_of_the_program() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"{DETAILED} largest models, {MOST_LAYERS} of each at most" in " ".join(text.split())
