"""Lines on stderr: words for people, or JSON for programs (`--log-format json`), whoever writes them.

docs/watching.md lists the fields.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from .events import (
    Event,
    fields_of,
    json_line,
    words_of,
)

LogFormat = Literal["text", "json"]

_chosen: LogFormat = "text"


@contextmanager
def written_as(log_format: LogFormat) -> Iterator[None]:
    """The format of everything that this process writes to stderr inside the context."""
    global _chosen  # noqa: PLW0603 - stderr is global, too
    before, _chosen = _chosen, log_format
    try:
        yield
    finally:
        _chosen = before


def is_json() -> bool:
    """Whether JSON was chosen."""
    return _chosen == "json"


def say(text: str) -> None:
    """Words for the user."""
    _print(_json("message", text=text) if is_json() else text)


def tell(event: Event, *, run: str, at_seconds: float) -> None:
    """An event of a run."""
    if is_json():
        _print(json_line({**_stamp(), "run": run, **fields_of(event, at_seconds)}))
    else:
        _print(words_of(event, at_seconds))


def report(words: str, *, run: str, at_seconds: float, **fields: Any) -> None:
    """How a run stands: `words`, or the fields."""
    _print(_json("progress", run=run, at_seconds=at_seconds, **fields) if is_json() else words)


class Formatter(logging.Formatter):
    """Records of the standard library's logging, in the format that was chosen."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        if not is_json():
            return super().format(record)
        return _json("log", level=record.levelname.lower(), text=record.getMessage())


def _json(kind: str, **fields: Any) -> str:
    return json_line({**_stamp(), "kind": kind, **fields})


def _stamp() -> dict[str, str]:
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")}


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
