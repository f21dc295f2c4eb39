"""The log of a run as its output keeps it: the events once it has ended, the states of its models before that."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore

from .events import Event, words_of
from .heartbeat import Watch
from .results import (
    EVENTS,
    RUNS,
    FleetResult,
    number,
    read_result,
)

_LOOK_SECONDS = 2.0
_PATIENCE_SECONDS = (
    15.0  # without a sign of life; a driver that has stopped to beat still writes its last words
)
_MOST_LOG_BYTES = 1 << 30


def kept_log(store: ObjectStore, run: str | None = None) -> list[dict[str, Any]]:
    """The events of a run (the latest without `run`), oldest first, as the output holds them now."""
    result = read_result(store, run)
    try:
        data = store.get(f"{RUNS}{result.run}/{EVENTS}", most_bytes=_MOST_LOG_BYTES)
    except ObjectNotFound:
        return _states(result)
    events = []
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # one torn line is no reason to show none
        if isinstance(event, dict):
            events.append(event)
    return events


def follow_run(
    store: ObjectStore,
    run: str | None,
    write: Callable[[str], object],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> FleetResult:
    """Hand on what is new of a run until it has ended, or shows no sign of life: then it is still "running"."""
    result, watch = read_result(store, run), Watch(store, clock)
    seen: set[tuple[str, str]] = set()
    alive_at = clock()
    while True:
        for event in _states(result):
            name = event["model"], event["kind"]
            if name not in seen:
                seen.add(name)
                write(line_of(event))
        if result.state != "running" or clock() - alive_at > _PATIENCE_SECONDS:
            return result
        sleep(_LOOK_SECONDS)
        result = read_result(store, result.run)
        if watch.is_alive(result.run):
            alive_at = clock()


def line_of(fields: Mapping[str, Any]) -> str:
    """An event's fields as one line of text."""
    task = fields.get("task")
    event = Event(
        kind=str(fields.get("kind", "")),
        model=str(fields.get("model", "")),
        task=None if task is None else str(task),
        seconds=number(fields, "seconds"),
        text=str(fields.get("text", "")),
    )
    return words_of(event, number(fields, "at_seconds") or 0.0)


def _states(result: FleetResult) -> list[dict[str, Any]]:
    """The models of a run that have begun, as events."""
    return [
        {"at_seconds": result.seconds, "model": model.name, "kind": model.state, "text": model.reason or ""}
        for model in result.models
        if model.state != "pending"
    ]
