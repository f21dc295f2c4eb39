"""The log of a run as its output keeps it: the events once it has ended, the states of its models before that."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore

from .figures import one_line
from .results import EVENTS, RUNS, FleetResult, read_result

_LOOK_SECONDS = 2.0
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
    sleep: Callable[[float], None] = time.sleep,
) -> FleetResult:
    """Hand on what is new of a run until it has ended; gives how it ended."""
    result = read_result(store, run)
    seen: set[str] = set()
    while True:
        for event in _states(result):
            line = line_of(event)
            if line not in seen:
                seen.add(line)
                write(line)
        if result.state != "running":
            return result
        sleep(_LOOK_SECONDS)
        result = read_result(store, result.run)


def line_of(event: Mapping[str, Any]) -> str:
    """An event as one line of text."""
    at, seconds = event.get("at_seconds"), event.get("seconds")
    words = [f"{at:.1f}s"] if isinstance(at, (int, float)) else []
    model, task = str(event.get("model", "")), str(event.get("task", ""))
    words += [word for word in (model, task.removeprefix(f"{model}/"), str(event.get("kind", ""))) if word]
    if isinstance(seconds, (int, float)):
        words.append(f"({seconds:.1f} s)")
    text = event.get("text")
    return one_line(" ".join(words) + (f": {text}" if text else ""))


def _states(result: FleetResult) -> list[dict[str, Any]]:
    """The models of a run that have begun, as events."""
    return [
        {"model": model.name, "kind": model.state, "text": model.reason or ""}
        for model in result.models
        if model.state != "pending"
    ]
