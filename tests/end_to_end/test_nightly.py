"""A night from end to end: a tick submits the fleet to a cluster, a node dies, and a browser shows what came of it."""

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.seaweed import SeaweedFS
from fleetpress.jobs.submission import job_state
from fleetpress.storage.store import open_store

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks" / folder) for folder in ("ray_matrix", "report")]

from browser import Browser  # noqa: E402
from matrix_fleet import write_fleet, write_spec  # noqa: E402
from ray_hosts import Hosts  # noqa: E402

MODELS = 4
PATIENCE_SECONDS = 200
SCHEDULES = """\
version: 1
output: {output}
schedules:
  - {{name: nightly, spec: fleet.yaml, cron: "{cron}", timezone: UTC, address: "{address}"}}
"""
ROWS = "Array.from(document.querySelectorAll('table.fleet tbody > tr:not(.opened)'), (it) => it.innerText)"


@pytest.fixture
def hosts(seaweedfs: SeaweedFS, seaweed_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Two nodes and a head that takes jobs; all of them, and this process, know the bucket."""
    with Hosts(nodes=2, takes_jobs=True, variables=seaweedfs.environment) as hosts:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", hosts.environment["RAY_AUTH_TOKEN_PATH"])
        yield hosts


def ended(address: str, job: str) -> str:
    """How a job ended."""
    ends_at = time.monotonic() + PATIENCE_SECONDS
    while (state := job_state(address, job)) is None or not state.is_over:
        assert time.monotonic() < ends_at, f"{job} does not end: {state}"
        time.sleep(0.5)
    return state.state


def test_a_nightly_fleet_survives_its_node_and_is_shown_by_a_browser(
    hosts: Hosts, seaweed_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"{seaweed_uri}/out"
    write_fleet(f"{seaweed_uri}/in", MODELS)
    write_spec(tmp_path / "fleet.yaml", f"{seaweed_uri}/in", output, epochs=60)
    now = datetime.now(UTC)
    file = tmp_path / "schedules.yaml"
    file.write_text(
        SCHEDULES.format(output=output, cron=f"{now.minute} {now.hour} * * *", address=hosts.jobs_address)
    )

    def told(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    (begun, *_) = told("schedule", "tick", str(file))["rows"]
    assert begun["action"] == "begun", begun
    lost = hosts.kill_node("train")
    assert ended(hosts.jobs_address, begun["job"]) == "succeeded"

    run = told("status", output, begun["job"])
    assert run["job"] == begun["job"]
    assert [model["state"] for model in run["models"]] == ["published"] * MODELS
    assert told("schedule", "tick", str(file))["rows"][0]["action"] == "ended"
    store = open_store(output)
    events = store.get(f"runs/{run['run']}/events.jsonl").decode().splitlines()
    retries = [event for event in map(json.loads, events) if event["kind"] == "retry"]
    assert any(f"train {event['model']}" == lost for event in retries), (lost, retries)

    page = tmp_path / "report.html"
    assert main(["report", output, "--html", str(page)]) == 0
    with Browser() as browser:
        shown = browser.open(page)
        rows = shown.run(ROWS)
        assert len(rows) == MODELS
        assert all("published" in row for row in rows)
        timeline = shown.run("document.getElementById('timeline').textContent")
        assert "tried again" in timeline or "retr" in timeline, timeline
        assert shown.complaints() == []
