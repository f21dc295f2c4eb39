"""A night: a real S3 server, a cluster of two nodes, two machines that tick, a node that is lost, and the next night.

Nobody waits for the run, and nobody begins it by hand: the ticks submit it once, the cluster goes on without the lost
node, and the next morning a browser shows what the bucket tells.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.driver.job_records import read_job
from fleetpress.jobs.runs.results import read_result, run_ids
from fleetpress.jobs.schedule.file import load_schedules
from fleetpress.jobs.schedule.tick import Row, Tick, tick
from fleetpress.storage.store import open_store

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks" / folder) for folder in ("faults", "ray_matrix", "report")]

from browser import Browser  # noqa: E402
from fault_fleet import files  # noqa: E402
from ray_hosts import Hosts  # noqa: E402

pytestmark = pytest.mark.long

SPEC = """\
version: 1
name: fleet
output: {place}/out
models:
  - {{source: "{place}/in/tiny.pt2", data: points, recipe: trained}}
  - {{source: "{place}/in/lone.safetensors", recipe: packed}}
data:
  points: {{train: "{place}/in/train-*.npz", eval: "{place}/in/eval.npz", loss: cross_entropy}}
recipes:
  trained: {{train: {{epochs: 500, batch_size: 32}}, quantize: {{scheme: W8A16}}, validate: {{max_drop: 1.0}}}}
  packed: {{quantize: {{scheme: W8A16_ASYM}}}}
"""
SCHEDULES = """\
version: 1
output: {place}/out
schedules:
  - {{name: nightly, spec: fleet.yaml, cron: "{minute} {hour} * * *", address: "{address}"}}
"""
ROWS = """\
Array.from(document.querySelectorAll("table.fleet tbody > tr:not(.opened)"),
           (it) => [it.cells[0].innerText, it.cells[1].innerText]).sort()
"""
COMMAND = "from fleetpress.jobs.cli import main; raise SystemExit(main())"
PATIENCE_SECONDS = 200


@pytest.fixture
def hosts(job_cluster: Callable[[], Hosts], seaweed_uri: str, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    """Two nodes that know the bucket; this process has the token of their job server."""
    cluster = job_cluster()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment["RAY_AUTH_TOKEN_PATH"])
    return cluster


def test_a_fleet_is_compressed_at_night_and_nothing_is_done_twice(
    hosts: Hosts, seaweed_uri: str, tmp_path: Path
) -> None:
    store = open_store(seaweed_uri)
    for key, data in files().items():
        store.put(f"in/{key}", data)
    fire = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=1)
    (tmp_path / "fleet.yaml").write_text(SPEC.format(place=seaweed_uri))
    path = tmp_path / "schedules.yaml"
    path.write_text(
        SCHEDULES.format(place=seaweed_uri, minute=fire.minute, hour=fire.hour, address=hosts.jobs_address)
    )

    machines = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, "schedule", "tick", str(path), "--json"],
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )
        for _ in range(2)
    ]
    told = [json.loads(machine.communicate(timeout=PATIENCE_SECONDS)[0]) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    actions = [row["action"] for result in told for row in result["rows"]]
    assert actions.count("begun") == 1, told
    job = f"nightly-{fire:%Y%m%dT%H%M}00Z"

    assert hosts.kill_node("train") == "train tiny"
    assert _until_ended(path, fire) == [("ended", job, "succeeded")]
    next_night = fire + timedelta(days=1)
    (begun,) = _ticked(path, next_night)
    assert begun.action == "begun"
    assert _until_ended(path, next_night) == [("ended", begun.job, "succeeded")]

    output = open_store(f"{seaweed_uri}/out")
    first, second = (read_result(output, run) for run in run_ids(output))
    assert {model.name: model.state for model in first.models} == {"tiny": "published", "lone": "published"}
    assert {model.name: model.state for model in second.models} == {"tiny": "unchanged", "lone": "unchanged"}
    assert [read_job(output, name).run for name in (job, begun.job)] == [first.run, second.run]

    page = tmp_path / "report.html"
    assert main(["report", output.uri, job, "--html", str(page)]) == 0
    with Browser() as browser:
        shown = browser.open(page)
        assert shown.run(ROWS) == [["lone", "published"], ["tiny", "published"]]
        assert "tried again" in shown.run("document.getElementById('timeline').textContent")
        assert shown.complaints() == []


def _ticked(path: Path, fire: datetime) -> list[Row]:
    how = Tick(now=fire + timedelta(minutes=5), by="test")
    return [row for row in tick(load_schedules(str(path)), how).rows if row.action != "waiting"]


def _until_ended(path: Path, fire: datetime) -> list[tuple[str, str, str]]:
    """Tick until the job of the fire has ended; what that tick tells."""
    ends_at = time.monotonic() + PATIENCE_SECONDS
    rows = _ticked(path, fire)
    while [row.action for row in rows] == ["running"]:
        assert time.monotonic() < ends_at, "the job does not end"
        time.sleep(0.5)
        rows = _ticked(path, fire)
    return [(row.action, row.job, row.reason) for row in rows]
