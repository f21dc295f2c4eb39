"""What happens in a run, one event after the other, and how it is written: as words, and as JSON.

A line of `events.jsonl` in the output and one of `--log-format json` hold the same fields; docs/watching.md lists them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .figures import one_line

TASK_OVER = frozenset({"finished", "retry", "give_up"})
"""Kinds of the events after which a task runs no more."""
MODEL_OVER = ("published", "unchanged", "rejected", "failed")
"""Kinds of the events after which a model has its last state."""

_encode = json.JSONEncoder(sort_keys=True).encode  # one for all: making it costs as much as using it
_WORDS = {"retry": "is tried again", "give_up": "given up"}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened: a task started, finished, failed or is tried again, or a model reached a state.

    `step` is the task's kind (train, convert ...), `where` the node it ran on, `seconds` how long it ran until this
    event; what it read and wrote is known then, too.
    """

    kind: str
    model: str
    task: str | None = None
    step: str = ""
    seconds: float | None = None
    where: str = ""
    bytes_read: int = 0
    bytes_written: int = 0
    text: str = ""


def fields_of(event: Event, at_seconds: float) -> dict[str, Any]:
    """The event as a JSON object, without what it does not say."""
    told = {name: value for name, value in vars(event).items() if value not in (None, "", 0)}
    if event.seconds is not None:
        told["seconds"] = event.seconds  # a task that took no time at all has ended all the same
    return {"at_seconds": at_seconds, **told}


def json_line(fields: Mapping[str, Any]) -> str:
    """One object on one line, without its end."""
    return _encode(fields)


def words_of(event: Event, at_seconds: float) -> str:
    """The event for people, on one line."""
    words = [f"{at_seconds:.1f}s", event.model]
    if event.task is not None:
        words.append(label_of(event.model, event.task))
    words.append(_WORDS.get(event.kind, event.kind))
    if event.seconds is not None:
        words.append(f"({event.seconds:.1f} s)")
    return one_line(" ".join(words) + (f": {event.text}" if event.text else ""))


def label_of(model: str, task: str) -> str:
    """A task's id without its model."""
    return task.removeprefix(f"{model}/")
