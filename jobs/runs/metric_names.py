"""The metrics of a run, as Prometheus knows them; docs/metrics.md and the Grafana dashboard use exactly these.

Ray puts `ray_` before every name, and labels of its own beside ours (`SessionName`, `NodeAddress`, `WorkerId` ...).
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "ray_"


@dataclass(frozen=True, kw_only=True)
class RunMetric:
    """One metric: its name in the code, what kind it is, its labels beside `fleet`, and what it tells."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...] = ()
    meaning: str

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return PREFIX + self.name


MODELS = RunMetric(
    name="fleetpress_models", kind="gauge", labels=("state",), meaning="models of the run in this state"
)
TASKS_LEFT = RunMetric(
    name="fleetpress_tasks_left", kind="gauge", meaning="tasks that are neither done nor given up"
)
TASKS_RUNNING = RunMetric(
    name="fleetpress_tasks_running", kind="gauge", meaning="tasks that were handed to the cluster"
)
LEFT_SECONDS = RunMetric(
    name="fleetpress_left_seconds",
    kind="gauge",
    meaning="estimate of the time left; -1 while there is none, or only a lower bound",
)
READ_BYTES = RunMetric(
    name="fleetpress_read_bytes_total",
    kind="counter",
    labels=("step",),
    meaning="bytes of objects that tasks have read",
)
WRITTEN_BYTES = RunMetric(
    name="fleetpress_written_bytes_total",
    kind="counter",
    labels=("step",),
    meaning="bytes of objects that tasks have written",
)
BUSY_SECONDS = RunMetric(
    name="fleetpress_busy_seconds_total",
    kind="counter",
    labels=("step",),
    meaning="time that tasks have taken, failed tries included",
)
STEP_SECONDS = RunMetric(
    name="fleetpress_step_seconds",
    kind="histogram",
    labels=("step",),
    meaning="time of a finished task; Ray estimates the `_sum` from the buckets, the counter above is exact",
)
RETRIES = RunMetric(
    name="fleetpress_retries_total", kind="counter", labels=("step",), meaning="tasks that were tried again"
)
GIVE_UPS = RunMetric(
    name="fleetpress_give_ups_total", kind="counter", labels=("step",), meaning="tasks that were given up"
)

RUN_METRICS = (
    MODELS,
    TASKS_LEFT,
    TASKS_RUNNING,
    LEFT_SECONDS,
    READ_BYTES,
    WRITTEN_BYTES,
    BUSY_SECONDS,
    STEP_SECONDS,
    RETRIES,
    GIVE_UPS,
)
STEP_BUCKETS_SECONDS = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0)


def markdown_table() -> str:
    """The table of docs/metrics.md."""
    rows = []
    for one in RUN_METRICS:
        labels = ", ".join(f"`{label}`" for label in ("fleet", *one.labels))
        rows.append(f"| `{one.exported}` | {one.kind} | {labels} | {one.meaning} |")
    return "\n".join(["| name | kind | labels | what it tells |", "|---|---|---|---|", *rows])
