"""What a run says of itself: states of models, the summary in the bucket, the exit code. No torch, no ray."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from heapq import nlargest
from typing import Any, Literal, TypeGuard, get_args

from fleetpress.storage.artifact import METRICS, artifact_key
from fleetpress.storage.errors import ArtifactCorrupt, ObjectNotFound
from fleetpress.storage.near_misses import hint
from fleetpress.storage.store import ObjectStore, read_json

from ..threads import side_by_side

ModelState = Literal["pending", "running", "published", "unchanged", "rejected", "failed"]
RunState = Literal["running", "done", "interrupted"]
GOOD: tuple[ModelState, ...] = ("published", "unchanged")
RUNS = "runs/"
SUMMARY = "summary.json"
REPORT = "report.html"
EVENTS = "events.jsonl"
SPEC = "spec.yaml"
DETAILED = 50  # models of a page that show their layers; each costs a request

_KINDS = {
    "name": str,
    "state": str,
    "digest": str | None,
    "before": Mapping | None,
    "after": Mapping | None,
}
_LARGEST_WHOLE = 10**300  # a float holds it
_SUMMARY_SECONDS = 2.0
_SUMMARY_SHARE = 0.05
_MOST_SUMMARY_BYTES = 1 << 30  # of a million models
_MOST_SUMMARY_SIGNS = 64_000_000
_NAMED_RUNS = 10  # in a message


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One row of the fleet: `before` and `after` as in metrics.json, `reason` for a state that is not success."""

    name: str
    state: ModelState
    reason: str | None = None
    digest: str | None = None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    compression_ratio: float | None = None
    bits_per_weight: float | None = None
    max_drop: float | None = None  # what validation accepts, in the metric's own unit
    unreachable: bool = False


@dataclass(frozen=True, kw_only=True)
class RunningTask:
    """A task that is being worked on, for so long."""

    model: str
    task: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The tasks of a run as they stand. Of those that run, some fifty are named in `running`.

    Bytes are those that tasks have read and written of objects. `seconds_left` is an estimate, None if there is none;
    with `seconds_left_is_least` there are steps left of which no task has ended, and it takes longer.
    """

    executor: str = ""
    tasks_total: int = 0
    tasks_left: int = 0
    tasks_running: int = 0
    running: tuple[RunningTask, ...] = ()
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_left: float | None = None
    seconds_left_is_least: bool = False


@dataclass(frozen=True, kw_only=True)
class FleetResult(Standing):
    """A run: its id, its state, its output, and its models in the order of the spec."""

    run: str
    state: RunState
    name: str
    output: str
    models: tuple[ModelResult, ...]
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    job: str | None = None  # of the cluster that was told to run it
    versions: Mapping[str, str] = field(default_factory=dict)  # of the driver, by library

    @property
    def exit_code(self) -> int:
        """0 all well, 3 some models were not published, 4 none was, 5 none because of storage, 130 interrupted."""
        if self.state == "interrupted":
            return 130
        good = [model for model in self.models if model.state in GOOD]
        if len(good) == len(self.models):
            return 0
        if good:
            return 3
        return 5 if all(model.unreachable for model in self.models) else 4

    def ended(self, state: RunState) -> "FleetResult":
        """The run with its last state: nothing is under way any more."""
        return replace(
            self, state=state, running=(), tasks_running=0, seconds_left=None, seconds_left_is_least=False
        )

    def as_dict(self) -> dict[str, Any]:
        """The documented form of `status --json`."""
        return {
            "run": self.run,
            "state": self.state,
            "name": self.name,
            "output": self.output,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "job": self.job,
            "versions": dict(self.versions),
            "totals": totals(self.models),
            **{name: getattr(self, name) for name in _STANDING},
            "running": [asdict(task) for task in self.running],
            "models": [{name: getattr(model, name) for name in _TOLD} for model in self.models],
        }


_TOLD = tuple(known.name for known in fields(ModelResult) if known.name != "unreachable")
_STANDING = tuple(known.name for known in fields(Standing))
_OF_RUN = tuple(known.name for known in fields(FleetResult))


class SummaryWriter:
    """Keeps `runs/<run>/summary.json` fresh: at most every two seconds, and for a twentieth of the time at most.

    A summary tells of every model, so that of a large fleet costs much; it is then written less often. `clock` gives
    seconds and does not go back.
    """

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._next_at = 0.0

    def write(self, result: Callable[[], FleetResult]) -> None:
        """Write it now."""
        started = self._clock()
        write_summary(self._store, result())
        ended = self._clock()
        cost = ended - started
        self._next_at = ended + max(_SUMMARY_SECONDS, cost / _SUMMARY_SHARE - cost)

    def refresh(self, result: Callable[[], FleetResult]) -> None:
        """Write it if its time has come."""
        if self._clock() >= self._next_at:
            self.write(result)


def write_summary(store: ObjectStore, result: FleetResult) -> None:
    """Replace `runs/<run>/summary.json`: a line for each model."""
    told = result.as_dict()
    rows = ",\n".join(map(_compact, told.pop("models")))
    text = f'{{"models":[\n{rows}\n],{_compact(told)[1:]}\n'
    store.put(summary_key(result.run), text.encode())


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def summary_key(run: str) -> str:
    """Where the summary of a run lies."""
    return f"{RUNS}{run}/{SUMMARY}"


def run_ids(store: ObjectStore) -> list[str]:
    """Ids of the runs in an output, oldest first: they begin with the time they were started at. One listing."""
    return runs_among(store.sizes(RUNS))


def runs_among(keys: Iterable[str]) -> list[str]:
    """The same of a listing of RUNS."""
    suffix = f"/{SUMMARY}"
    return sorted(key.removeprefix(RUNS).removesuffix(suffix) for key in keys if key.endswith(suffix))


def read_result(store: ObjectStore, run: str | None = None) -> FleetResult:
    """The summary of a run, the latest without `run`. Raises ObjectNotFound with the runs that exist."""
    if run is None:
        known = run_ids(store)
        if not known:
            what = f"{store.uri} holds no runs; give the `output` of a spec that was run"
            raise ObjectNotFound(what + hint(store.uri))
        run = known[-1]
    key = summary_key(run)
    try:
        told = read_json(store, key, most_bytes=_MOST_SUMMARY_BYTES, most_signs=_MOST_SUMMARY_SIGNS)
        if not isinstance(told, dict):
            raise ValueError("it is no object")
        its = {name: told[name] for name in _OF_RUN if name in told}  # a newer version may tell more
        for name in ("run", "state", "name", "output"):
            if not isinstance(its.get(name), str):
                raise ValueError(f"{name} is missing, or no text")
        if number(its, "seconds") is None:
            raise ValueError("seconds is missing, or no number")
        return FleetResult(
            **{
                **its,
                **_standing(told),
                "models": tuple(map(_row, told["models"])),
                "warnings": tuple(told.get("warnings", ())),
                "versions": dict(told.get("versions", {})),
            }
        )
    except ObjectNotFound:
        latest = ", ".join(run_ids(store)[-_NAMED_RUNS:]) or "none"
        raise ObjectNotFound(f"{store.uri} holds no run {run!r}; the latest are: {latest}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactCorrupt(f"{store.uri}/{key} is no run summary ({error}); delete it") from None


def _standing(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of tasks; those of older versions say nothing."""
    found: dict[str, Any] = {"running": tuple(RunningTask(**task) for task in told.get("running", ()))}
    for name in (
        "executor",
        "tasks_total",
        "tasks_left",
        "tasks_running",
        "retries",
        "bytes_read",
        "bytes_written",
    ):
        kind = str if name == "executor" else int
        found[name] = told.get(name, kind())
        if not isinstance(found[name], kind) or (kind is int and not _is_number(found[name])):
            raise ValueError(f"{name} is of the wrong type")
    left = told.get("seconds_left")
    if left is not None and not _is_number(left):
        raise ValueError("seconds_left is of the wrong type")
    return found


def _row(told: Mapping[str, Any]) -> ModelResult:
    row = ModelResult(**{name: told[name] for name in _TOLD if name in told})
    for name, kinds in _KINDS.items():
        if not isinstance(getattr(row, name), kinds):
            raise ValueError(f"{name} of a model is of the wrong type")
    for name in ("compression_ratio", "bits_per_weight", "max_drop"):
        value = getattr(row, name)
        if value is not None and not _is_number(value):
            raise ValueError(f"{name} of a model is no number")
    if row.state not in get_args(ModelState):
        raise ValueError(f"{row.state!r} is no state of a model")
    return row


def measured_result(
    name: str, state: ModelState, digest: str | None, metrics: Mapping[str, Any], reason: str | None = None
) -> ModelResult:
    """The row of a model whose metrics are known. Raises LookupError, TypeError for what is no metrics.json."""
    return ModelResult(
        name=name,
        state=state,
        reason=reason,
        digest=digest,
        before=metrics["before"],
        after=metrics["after"],
        compression_ratio=metrics["compression_ratio"],
        bits_per_weight=metrics["bits_per_weight"],
    )


def counts(models: Sequence[ModelResult]) -> dict[str, int]:
    """How many models are in which state, in the order of first appearance."""
    found: dict[str, int] = {}
    for model in models:
        found[model.state] = found.get(model.state, 0) + 1
    return found


def totals(models: Sequence[ModelResult]) -> dict[str, Any]:
    """A fleet in four numbers: models by state, and bytes before and after of those that are published."""
    before, after = published_bytes(models)
    return {"models": counts(models), "bytes_before": before, "bytes_after": after}


def published_bytes(models: Iterable[ModelResult]) -> tuple[float, float]:
    """Bytes before and after of all models that are published; a rejected model saves nothing."""
    before = after = 0.0
    for model in models:
        if model.state in GOOD:
            old, new = number(model.before, "bytes"), number(model.after, "bytes")
            if old is not None and new is not None and math.isfinite(old + new):
                before, after = before + old, after + new
    return before, after


def number(fields: Mapping[str, Any] | None, key: str) -> float | None:
    """The number at `key`, None for whatever else a file may hold there."""
    value = (fields or {}).get(key)
    return value if _is_number(value) else None


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is one that a float can be made of: JSON has whole numbers without end."""
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= _LARGEST_WHOLE)


def detailed(result: FleetResult) -> list[ModelResult]:
    """The models whose layers a page shows, in the order of the fleet: of many, the largest published ones."""
    known = [model for model in result.models if model.digest is not None]
    chosen = {model.name for model in nlargest(DETAILED, known, key=_bytes_before)}
    return [model for model in known if model.name in chosen]


def layers_of(store: ObjectStore, result: FleetResult) -> dict[str, Mapping[str, Any]]:
    """The content of metrics.json of the models that a page shows in full; DETAILED requests at most."""
    models = detailed(result)
    found = side_by_side(partial(_metrics, store), models)
    return {model.name: metrics for model, metrics in zip(models, found, strict=True) if metrics}


def _metrics(store: ObjectStore, model: ModelResult) -> Mapping[str, Any] | None:
    try:
        found = read_json(store, artifact_key(model.name, str(model.digest), METRICS))
    except (ObjectNotFound, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _bytes_before(model: ModelResult) -> float:
    return number(model.before, "bytes") or 0.0
