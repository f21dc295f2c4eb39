"""Metrics of a run, as Prometheus scrapes them from a Ray node."""

import re
import secrets
import time
import urllib.request

import ray

from fleetpress.jobs.executors import open_metrics
from fleetpress.jobs.runs.events import Event
from fleetpress.jobs.runs.metric_names import RUN_METRICS
from fleetpress.jobs.runs.progress import Progress
from fleetpress.jobs.runs.results import ModelResult

Samples = dict[tuple[str, str], float]
"""Values by name and our own labels."""


def scraped(fleet: str) -> Samples:
    """What the node's metrics port says of one fleet."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        text = reply.read().decode()
    found: Samples = {}
    for name, labels, value in re.findall(r"^(ray_fleetpress_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        own = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if own.get("fleet") == fleet:
            told = own.get("state") or own.get("step") or ""
            found[name, f"{told} {own['le']}" if "le" in own else told] = float(value)
    return found


def test_prometheus_finds_the_metrics_of_a_run(ray_cluster: None) -> None:
    fleet = f"fleet-{secrets.token_hex(4)}"
    progress = Progress(run="r", started=time.monotonic() - 10, executor="ray")
    listener = open_metrics("ray", fleet)
    assert listener is not None
    progress.set(ModelResult(name="a", state="running"))
    progress.set(ModelResult(name="b", state="published"))
    progress.left = {"train": 1}
    for kind, extra in (
        ("started", {}),
        ("retry", {"seconds": 2.0, "bytes_read": 30}),
        ("started", {}),
        ("finished", {"seconds": 4.0, "bytes_read": 12, "bytes_written": 5}),
        ("started", {}),
        ("give_up", {"seconds": 1.0}),
    ):
        event = Event(kind=kind, model="a", task="a/train", step="train", **extra)  # type: ignore[arg-type]
        progress.note(event, progress.seconds)
        listener(event, progress)

    wanted = {
        ("ray_fleetpress_models", "running"): 1.0,
        ("ray_fleetpress_models", "published"): 1.0,
        ("ray_fleetpress_tasks_left", ""): 1.0,
        ("ray_fleetpress_tasks_running", ""): 0.0,
        ("ray_fleetpress_read_bytes_total", "train"): 42.0,
        ("ray_fleetpress_written_bytes_total", "train"): 5.0,
        ("ray_fleetpress_busy_seconds_total", "train"): 7.0,
        ("ray_fleetpress_retries_total", "train"): 1.0,
        ("ray_fleetpress_give_ups_total", "train"): 1.0,
        ("ray_fleetpress_step_seconds_count", "train"): 1.0,
        ("ray_fleetpress_step_seconds_bucket", "train 1.0"): 0.0,
        ("ray_fleetpress_step_seconds_bucket", "train 5.0"): 1.0,
    }
    deadline, found = time.monotonic() + 40, Samples()
    while not wanted.items() <= found.items() and time.monotonic() < deadline:
        time.sleep(0.5)
        found = scraped(fleet)
    assert wanted.items() <= found.items(), found
    names = {re.sub("_(bucket|count|sum)$", "", name) for name, _ in found}
    assert names == {metric.exported for metric in RUN_METRICS}


def test_an_inline_run_has_no_place_for_metrics() -> None:
    assert open_metrics("inline", "fleet") is None
