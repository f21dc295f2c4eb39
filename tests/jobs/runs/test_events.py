"""Events of a run: one format for the output, for logs, and for people."""

import json

import pytest

from fleetpress.jobs.runs.events import (
    Event,
    fields_of,
    json_line,
    words_of,
)

ENDED = Event(
    kind="finished",
    model="team/lenet5",
    task="team/lenet5/collect[1]",
    step="collect",
    seconds=0.44,
    where="10.0.0.7/3f2a9c",
    bytes_read=1000,
    bytes_written=20,
)


def test_an_event_as_json() -> None:
    assert json.loads(json_line(fields_of(ENDED, 12.34))) == {
        "at_seconds": 12.34,
        "kind": "finished",
        "model": "team/lenet5",
        "task": "team/lenet5/collect[1]",
        "step": "collect",
        "seconds": 0.44,
        "where": "10.0.0.7/3f2a9c",
        "bytes_read": 1000,
        "bytes_written": 20,
    }


def test_what_an_event_does_not_say_is_left_out() -> None:
    event = Event(kind="published", model="a")
    assert fields_of(event, 0.0) == {"at_seconds": 0.0, "kind": "published", "model": "a"}
    waited = Event(kind="finished", model="a", task="a/collect", seconds=0.0)
    assert fields_of(waited, 1.0)["seconds"] == 0.0


def test_a_line_is_one_line() -> None:
    line = json_line(fields_of(Event(kind="failed", model="a", text="one\ntwo\x1b[2J"), 0.0))
    assert line.isprintable()
    assert json.loads(line)["text"] == "one\ntwo\x1b[2J"


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (ENDED, "12.3s team/lenet5 collect[1] finished (0.4 s)"),
        (Event(kind="published", model="lenet5"), "12.3s lenet5 published"),
        (
            Event(kind="rejected", model="gpt", text="accuracy fell\x1b[2J\nfar"),
            "12.3s gpt rejected: accuracy fell?[2J far",
        ),
    ],
    ids=["a task", "a model", "hostile text"],
)
def test_an_event_in_words(event: Event, words: str) -> None:
    assert words_of(event, 12.34) == words
