"""Every run of an output in a line: from the ends of the summaries, so that the size of the fleet costs nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from fleetpress.storage.errors import StorageError
from fleetpress.storage.store import ObjectStore

from ..threads import side_by_side
from .results import (
    RUNS,
    ModelState,
    RunState,
    number,
    read_result,
    runs_among,
    summary_key,
    totals,
)

_TAIL_BYTES = 16 << 10
_END_OF_MODELS = b"\n],"


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """A run: its spec's name, how long it took, models by state, and bytes of the published ones before and after."""

    run: str
    name: str
    state: RunState
    seconds: float
    models: Mapping[str, int]
    bytes_before: float
    bytes_after: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "models": dict(self.models)}


def run_lines(store: ObjectStore) -> tuple[list[RunLine], list[str]]:
    """All runs, oldest first, and the ids of those whose summary cannot be read: a listing, and a request for each.

    A summary ends with what is asked for here; only one of an older version is read as a whole.
    """
    sizes = store.sizes(RUNS)
    runs = runs_among(sizes)
    found = side_by_side(partial(_line, store), [(run, sizes[summary_key(run)]) for run in runs])
    lines = [line for line in found if line is not None]
    return lines, [run for run, line in zip(runs, found, strict=True) if line is None]


def _line(store: ObjectStore, asked: tuple[str, int]) -> RunLine | None:
    run, size = asked
    try:
        start = max(0, size - _TAIL_BYTES)
        tail = store.get_range(summary_key(run), start, size - start)
        return _from_tail(tail) or _from_all(store, run)
    except StorageError:  # it has been written anew since it was listed, or is damaged
        try:
            return _from_all(store, run)
        except StorageError:
            return None


def _from_tail(tail: bytes) -> RunLine | None:
    """What stands behind the models; None if that is of an older version, or too much for a tail."""
    at = tail.rfind(_END_OF_MODELS)
    if at < 0:
        return None
    try:
        told = json.loads(b"{" + tail[at + len(_END_OF_MODELS) :])
        its = told["totals"]
        models = {str(state): int(count) for state, count in its["models"].items()}
        if told["state"] not in get_args(RunState) or not models.keys() <= set(get_args(ModelState)):
            return None
        before, after = number(its, "bytes_before"), number(its, "bytes_after")
        return RunLine(
            run=str(told["run"]),
            name=str(told["name"]),
            state=told["state"],
            seconds=number(told, "seconds") or 0.0,
            models=models,
            bytes_before=before or 0.0,
            bytes_after=after or 0.0,
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _from_all(store: ObjectStore, run: str) -> RunLine:
    result = read_result(store, run)
    return RunLine(
        run=run, name=result.name, state=result.state, seconds=result.seconds, **totals(result.models)
    )
