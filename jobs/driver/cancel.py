"""Ask a run to end, from anywhere, and see that it does; tell of one whose driver is dead, and mark it as ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fleetpress.storage import canonical_json
from fleetpress.storage.artifact import exists
from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore

from ..errors import UsageError
from ..runs.heartbeat import (
    Watch,
    alive_key,
    cancel_key,
)
from ..runs.results import (
    RUNS,
    FleetResult,
    RunState,
    read_result,
    runs_among,
)

_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0
_LAST_WORDS_SECONDS = 10.0  # a driver that has stopped to beat still writes its summary and page

Outcome = Literal["over", "cancelled", "dead", "asked"]


@dataclass(frozen=True, kw_only=True)
class Cancelled:
    """What became of a run: it was `over` before, has been `cancelled`, its driver is `dead`, or it is only `asked`."""

    run: str
    state: RunState
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def cancel(
    store: ObjectStore,
    run: str | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Cancelled:
    """End a run: the only one that is under way, or the one that is named. Waits half a minute at most.

    Raises ObjectNotFound if there is no such run, UsageError if several are under way and none is named.
    """
    run = run or _under_way(store)
    state = read_result(store, run).state
    if state != "running":
        return Cancelled(run=run, state=state, outcome="over")
    store.put(cancel_key(run), canonical_json.dumps({"cancel": run}))
    watch, ends_at = Watch(store, clock), clock() + _PATIENCE_SECONDS
    while watch.is_alive(run):
        if clock() >= ends_at:
            return Cancelled(run=run, state="running", outcome="asked")
        sleep(_LOOK_SECONDS)
    ends_at = clock() + _LAST_WORDS_SECONDS
    while (result := read_result(store, run)).state == "running":
        if clock() >= ends_at or exists(store, alive_key(run)):  # its sign is there, and does not change
            return _bury(store, result)
        sleep(_LOOK_SECONDS)
    store.delete(cancel_key(run))
    return Cancelled(run=run, state=result.state, outcome="cancelled")


def _under_way(store: ObjectStore) -> str:
    """The run that has not ended: it shows signs of life, or is the latest."""
    keys = store.sizes(RUNS)
    runs = runs_among(keys)
    likely = [run for run in runs if alive_key(run) in keys or run == runs[-1]]
    if not likely:
        raise ObjectNotFound(f"{store.uri} holds no runs; give the `output` of a spec that is being run")
    under_way = [run for run in likely if read_result(store, run).state == "running"]
    if len(under_way) > 1:
        raise UsageError(f"{store.uri}: several runs are under way: {', '.join(under_way)}; name one")
    return (under_way or likely)[-1]


def _bury(store: ObjectStore, result: FleetResult) -> Cancelled:
    """Write down, as itself would have, that a dead run has ended. The wish stays, in case its driver only slept."""
    from ..report import write_end

    write_end(store, result.ended("interrupted"))
    store.delete(alive_key(result.run))
    return Cancelled(run=result.run, state="interrupted", outcome="dead")
