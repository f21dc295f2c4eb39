"""What a page is made of beside the summary: read from the output in a fixed number of requests."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fleetpress.storage.errors import StorageError
from fleetpress.storage.store import ObjectStore

from ..runs.past_runs import look_back
from ..runs.results import (
    EVENTS,
    RUNS,
    SPEC,
    FleetResult,
    layers_of,
)

_MOST_EVENT_BYTES = 256 << 20  # of a hundred thousand models; more would take minutes to draw
_MOST_SPEC_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Material:
    """The content of metrics.json by model, the run before, the lines of events.jsonl, and the spec's text."""

    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    previous: FleetResult | None = None
    events: Iterable[bytes] = ()
    spec_text: str | None = None


def gather(store: ObjectStore, result: FleetResult) -> Material:
    """From the output alone: one listing, the summary before, events, spec, and the layers of the largest models.

    A page does without whatever cannot be read; only a missing summary keeps it from being made.
    """
    events = _read(store, f"{RUNS}{result.run}/{EVENTS}", _MOST_EVENT_BYTES)
    spec = _read(store, f"{RUNS}{result.run}/{SPEC}", _MOST_SPEC_BYTES)
    return Material(
        layers=layers_of(store, result),
        previous=look_back(store, result.name, result.run).done,
        events=(events or b"").splitlines(),
        spec_text=None if spec is None else spec.decode("utf-8", errors="replace"),
    )


def _read(store: ObjectStore, key: str, most_bytes: int) -> bytes | None:
    try:
        return store.get(key, most_bytes=most_bytes)
    except StorageError:
        return None
