"""Many runs of an output: read from the ends of their summaries, drawn, linked, and printed."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from example_fleets import fleet

from fleetpress.jobs.cli import main
from fleetpress.jobs.report import render_runs
from fleetpress.jobs.runs.results import (
    FleetResult,
    summary_key,
    write_summary,
)
from fleetpress.jobs.runs.run_lines import RunLine, run_lines
from fleetpress.storage.store import ObjectStore, open_store

EVIL = "<script>alert('x')</script>"
RUNS = [f"202603{day:02}T020000000Z-aabbcc" for day in (1, 2, 3)]


def write(store: ObjectStore, run: str, size: int = 5, **more: Any) -> FleetResult:
    result = replace(fleet(size), run=run, output=store.uri, **more)
    write_summary(store, result)
    return result


def test_every_run_in_a_line(store: ObjectStore) -> None:
    for run in RUNS:
        write(store, run, state="done", seconds=12.5)
    lines, unread = run_lines(store)
    assert [line.run for line in lines] == RUNS
    assert unread == []
    result = fleet(5)
    assert lines[0].seconds == 12.5
    assert sum(lines[0].models.values()) == 5
    assert lines[0].bytes_before == sum((model.before or {})["bytes"] for model in result.models)


def test_large_summaries_are_not_read_as_a_whole(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in RUNS:
        write(store, run, size=300)
    read: Counter[str] = Counter()
    get_range = type(store).get_range

    def counted(self: Any, key: str, start: int, length: int, **more: Any) -> bytes:
        read[key] += length
        return bytes(get_range(self, key, start, length, **more))

    monkeypatch.setattr(type(store), "get_range", counted)
    monkeypatch.delattr(type(store), "get")
    assert len(run_lines(store)[0]) == 3
    assert all(length <= 16 << 10 for length in read.values())


def test_summaries_of_older_versions_are_read_as_a_whole(store: ObjectStore) -> None:
    result = write(store, RUNS[0], size=40)
    told = result.as_dict()
    for key in ("totals", "versions"):
        del told[key]
    for row in told["models"]:
        del row["max_drop"]
    store.put(summary_key(RUNS[1]), json.dumps({**told, "run": RUNS[1]}).encode())
    lines, unread = run_lines(store)
    assert not unread
    assert lines[1] == replace(lines[0], run=RUNS[1])


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"torn",
        b"\n],",
        b'\n],"totals":{"models":[]}}',
        b'\n],"totals":{"models":{"x":1}},"state":"done","run":"r"}',
    ],
)
def test_damaged_summaries_are_named(store: ObjectStore, damage: bytes) -> None:
    write(store, RUNS[0])
    store.put(summary_key(RUNS[1]), damage)
    lines, unread = run_lines(store)
    assert [line.run for line in lines] == RUNS[:1]
    assert unread == RUNS[1:2]


def line(run: str, **more: Any) -> RunLine:
    told: dict[str, Any] = {"name": "n", "state": "done", "seconds": 1.0, "models": {"published": 2}}
    return RunLine(run=run, **{**told, "bytes_before": 200.0, "bytes_after": 50.0, **more})


def test_the_page_tells_every_run_and_escapes_it() -> None:
    html = render_runs(f"s3://b/{EVIL}", [line(RUNS[0], name=EVIL), line(EVIL), line(RUNS[2])], unread=[EVIL])
    assert EVIL not in html
    assert "<script" not in html
    assert html.count('class="s-saved"') == 3
    assert "script-src &#39;none&#39;;" in html
    assert html == render_runs(
        f"s3://b/{EVIL}", [line(RUNS[0], name=EVIL), line(EVIL), line(RUNS[2])], unread=[EVIL]
    )
    assert "75.0 %" in html


def test_links_lead_from_the_page_to_the_runs(tmp_path: Path) -> None:
    output = tmp_path / "an output"
    html = render_runs(str(output), [line(RUNS[0])], page=str(tmp_path / "pages" / "runs.html"))
    assert f'href="../an%20output/runs/{RUNS[0]}/report.html"' in html
    assert f'href="runs/{RUNS[0]}/report.html"' in render_runs(
        "s3://b/o", [line(RUNS[0])], page="/anywhere/x.html"
    )


def test_no_runs_and_runs_of_nothing() -> None:
    assert "holds no runs" in render_runs("o", [])
    empty = line(RUNS[0], models={}, bytes_before=0.0, bytes_after=0.0, state="interrupted")
    assert "nothing yet" in render_runs("o", [empty])
    grown = line(RUNS[0], bytes_after=300.0)
    assert "\u221250.0 %" in render_runs("o", [grown]) or "-50.0 %" in render_runs("o", [grown])


def test_very_many_runs_are_listed_and_the_latest_are_drawn() -> None:
    lines = [
        line(f"2026{month:02}{day:02}T000000000Z-a") for month in range(1, 13) for day in range(1, 29)
    ] * 2
    html = render_runs("o", lines)
    assert html.count('class="s-saved"') == 400
    assert f"The {len(lines) - 400} oldest runs are not drawn" in html


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(tmp_path / "output"))
    for run in RUNS:
        write(store, run)
    page = tmp_path / "runs.html"
    assert main(["report", store.uri, "--all", "--html", str(page)]) == 0
    told = capsys.readouterr()
    assert [row.split()[0] for row in told.out.splitlines()] == ["run", *RUNS]
    assert str(page) in told.err
    assert page.read_text(encoding="utf-8").count('<tr><th scope="row">') == 3
    assert main(["report", store.uri, "--all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == RUNS
    assert main(["report", store.uri, RUNS[0], "--all"]) == 2
    assert "leave --all out" in capsys.readouterr().err
