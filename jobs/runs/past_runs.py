"""What earlier runs of an output tell a later one: numbers of models that are the same, and what to compare with."""

from dataclasses import dataclass

from fleetpress.storage.errors import StorageError
from fleetpress.storage.store import ObjectStore

from .results import (
    GOOD,
    FleetResult,
    ModelResult,
    read_result,
    run_ids,
)

_LOOKED_AT = (
    10  # summaries, each a request: an output that several specs share must not cost one for every run
)


@dataclass(frozen=True, kw_only=True)
class Past:
    """The latest run that has ended, the latest of the same spec that was not interrupted, and how many were read."""

    ended: FleetResult | None
    done: FleetResult | None
    reads: int


def look_back(store: ObjectStore, name: str, run: str | None = None) -> Past:
    """What the runs before `run` tell (all runs without it); `name` is the spec's. One listing, mostly one summary."""
    before = [known for known in run_ids(store) if run is None or known < run]
    ended = None
    looked_at = before[-_LOOKED_AT:]
    for reads, candidate in enumerate(reversed(looked_at), start=1):
        try:
            result = read_result(store, candidate)
        except StorageError:
            continue
        if result.state == "running":
            continue
        ended = ended or result
        if result.state == "done" and result.name == name:
            return Past(ended=ended, done=result, reads=reads)
    return Past(ended=ended, done=None, reads=len(looked_at))


def rows_of(result: FleetResult | None) -> dict[str, ModelResult]:
    """Published and unchanged models of a run, by name."""
    rows = result.models if result else ()
    return {row.name: row for row in rows if row.state in GOOD}
