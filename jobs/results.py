"""What a run says of itself: states of models, the summary in the bucket, the exit code. No torch, no ray."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fleetpress.storage import canonical_json
from fleetpress.storage.artifact import artifact_key
from fleetpress.storage.errors import ArtifactCorrupt, ObjectNotFound
from fleetpress.storage.store import ObjectStore

ModelState = Literal["pending", "running", "published", "unchanged", "rejected", "failed"]
RunState = Literal["running", "done", "interrupted"]
RUNS = "runs/"
SUMMARY = "summary.json"
REPORT = "report.html"
EVENTS = "events.jsonl"


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
    unreachable: bool = False


@dataclass(frozen=True, kw_only=True)
class FleetResult:
    """A run: its id, its state, its output, and its models in the order of the spec."""

    run: str
    state: RunState
    name: str
    output: str
    models: tuple[ModelResult, ...]
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 all well, 3 some models were not published, 4 none was, 5 none because of storage, 130 interrupted."""
        if self.state == "interrupted":
            return 130
        good = [model for model in self.models if model.state in ("published", "unchanged")]
        if len(good) == len(self.models):
            return 0
        if good:
            return 3
        return 5 if all(model.unreachable for model in self.models) else 4

    def as_dict(self) -> dict[str, Any]:
        """The documented form of `status --json`."""
        models = [
            {key: value for key, value in asdict(model).items() if key != "unreachable"}
            for model in self.models
        ]
        return {
            "run": self.run,
            "state": self.state,
            "name": self.name,
            "output": self.output,
            "seconds": self.seconds,
            "models": models,
        }


def write_summary(store: ObjectStore, result: FleetResult) -> None:
    """Replace `runs/<run>/summary.json`."""
    store.put(f"{RUNS}{result.run}/{SUMMARY}", canonical_json.dumps(result.as_dict()))


def run_ids(store: ObjectStore) -> list[str]:
    """Ids of the runs in an output, oldest first: they begin with the time they were started at."""
    suffix = f"/{SUMMARY}"
    keys = [info.key for info in store.list(RUNS) if info.key.endswith(suffix)]
    return sorted(key.removeprefix(RUNS).removesuffix(suffix) for key in keys)


def read_result(store: ObjectStore, run: str | None = None) -> FleetResult:
    """The summary of a run, the latest without `run`. Raises ObjectNotFound with the runs that exist."""
    known = run_ids(store)
    if run is None and not known:
        raise ObjectNotFound(f"{store.uri} holds no runs; give the `output` of a spec that was run")
    if run is not None and run not in known:
        raise ObjectNotFound(f"{store.uri} holds no run {run!r}; it holds {', '.join(known) or 'none'}")
    key = f"{RUNS}{run or known[-1]}/{SUMMARY}"
    try:
        fields = json.loads(store.get(key))
        models = tuple(ModelResult(**model) for model in fields["models"])
        return FleetResult(**{**fields, "models": models})
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactCorrupt(f"{store.uri}/{key} is no run summary ({error}); delete it") from None


def counts(models: Sequence[ModelResult]) -> dict[str, int]:
    """How many models are in which state, in the order of first appearance."""
    found: dict[str, int] = {}
    for model in models:
        found[model.state] = found.get(model.state, 0) + 1
    return found


def layers_of(store: ObjectStore, result: FleetResult) -> dict[str, Mapping[str, Any]]:
    """The full metrics of every published model of a run, for the report."""
    found = {}
    for model in result.models:
        if model.digest is not None:
            try:
                found[model.name] = json.loads(
                    store.get(artifact_key(model.name, model.digest, "metrics.json"))
                )
            except (ObjectNotFound, ValueError):
                continue
    return found
