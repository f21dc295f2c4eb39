"""Crashes at the storage operations of a whole run, a selection of them.

`python benchmarks/crashes/crashes.py` takes every operation of every kind of model, on both stores, in every mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from crash_fleets import KINDS
from crash_forks import Outcome
from crash_store import KILLED, MODES
from crash_trials import Course, Quiet, clear, doubled, lost
from crashes import Row, crash, table

from fleetpress.storage.store import open_store

pytestmark = pytest.mark.long

Courses = Callable[[str, str], tuple[Course, Quiet]]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which operations are tried of a kind's run on a store: number `first`, and every so-and-so-many-th after it."""

    kind: str
    store: str
    mode: str
    first: int = 1
    every: int = 1

    def __str__(self) -> str:
        return f"{self.kind}-{self.store}-{self.mode}"


# Of each kind a few operations in each mode, never the same.
CHOSEN = [
    Selection(kind="checkpoint", store="folder", mode="fails before", every=4),
    Selection(kind="checkpoint", store="folder", mode="killed after", first=2, every=5),
    Selection(kind="shards", store="folder", mode="fails after", first=5, every=19),
    Selection(kind="shards", store="folder", mode="gone", first=7, every=23),
    Selection(kind="shards", store="folder", mode="killed before", first=2, every=13),
    Selection(kind="shards", store="s3", mode="gone", first=4, every=61),
    Selection(kind="shards", store="s3", mode="killed after", first=9, every=41),
    Selection(kind="program", store="folder", mode="gone", first=3, every=23),
    Selection(kind="program", store="folder", mode="killed after", first=6, every=17),
    Selection(kind="module", store="folder", mode="fails after", first=11, every=37),
    Selection(kind="module", store="folder", mode="killed before", first=8, every=37),
]


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_a_crash_loses_nothing_and_doubles_nothing(chosen: Selection, courses: Courses) -> None:
    course, quiet = courses(chosen.kind, chosen.store)
    ats = range(chosen.first, quiet.operations + 1, chosen.every)
    row = crash(course, quiet, chosen.store, chosen.mode, ats)
    assert not row.bad, table([row]) + "\n" + "\n".join(map(str, row.bad))
    # Two threads need not take the same number of operations each time: the last fault may find none.
    assert len(row.tried) >= len(ats) - 1 > 0
    if chosen.mode.startswith("killed"):
        assert {trial.codes for trial in row.tried} == {(KILLED, 0)}
    if chosen.mode == "fails before":
        assert {trial.codes[1] for trial in row.tried} == {0}


def test_every_kind_and_mode_is_tried() -> None:
    assert {chosen.kind for chosen in CHOSEN} == set(KINDS)
    assert {chosen.mode for chosen in CHOSEN} == set(MODES)


def test_what_is_lost_is_seen(courses: Courses) -> None:
    course, quiet = courses("checkpoint", "folder")
    output = f"{course.outputs}/spoiled"
    (outcome,) = course.run(output)
    store = open_store(output)
    assert list(lost(store, quiet, outcome)) == []
    weights, config, manifest = (
        next(key for key in quiet.published if key.endswith(name))
        for name in ("/model.safetensors", "/config.json", "/manifest.json")
    )
    data = store.get(weights)
    store.put(weights, data[:-1] + bytes([data[-1] ^ 1]))
    store.delete(config)
    store.put("models/lone/more", b"")
    store.put("records/more.tmp", b"")
    store.create_upload("models/lone/upload")
    told = "\n".join(lost(store, quiet, outcome))
    for problem in (
        f"{weights} is other",
        f"{config} is missing",
        "models/lone/more is too many",
        "records/more.tmp is of no use",
        "is unfinished",
    ):
        assert problem in told
    store.delete(manifest)
    assert f"{manifest} is missing" in "\n".join(lost(store, quiet, outcome))
    clear(output, store)


def test_a_run_that_does_not_end_well_is_lost(courses: Courses) -> None:
    course, quiet = courses("checkpoint", "folder")
    output = f"{course.outputs}/gone"
    (outcome,) = course.run(output, mode="gone", at=1)
    (first, *_) = lost(open_store(output), quiet, outcome)
    assert first.startswith("exit code 5: ")
    clear(output, open_store(output))


START, END = {"event": "start", "task": "net/train", "digest": "d"}, {"event": "end", "digest": "d"}


@pytest.mark.parametrize(
    ("runs", "found"),
    [
        ([[{**START, "recorded": False}], [{**START, "recorded": False}]], []),
        ([[{**START, "recorded": False}], [{**START, "recorded": True}]], ["net/train"]),
        ([[{**START, "recorded": False}, {**END, "recorded": True}], [{**START, "recorded": False}]], ["net/train"]),
        ([[{**START, "recorded": False}, {**END, "recorded": False}, {**START, "recorded": False}]], []),
        ([[{"event": "fault", "in_flight": ["d"]}], [{**START, "recorded": True}]], []),
        ([[{"event": "fault", "in_flight": ["d"]}], [{**START, "recorded": True}] * 2], ["net/train"]),
    ],
    ids=["no record", "a record", "ended and lost", "failed", "in flight", "in flight, twice"],
)  # fmt: skip
def test_what_is_done_again_is_seen(runs: list[list[dict[str, Any]]], found: list[str]) -> None:
    assert doubled(*(Outcome(code=0, out="", err="", notes=tuple(notes)) for notes in runs)) == found


def test_the_table_counts_what_was_lost_and_doubled() -> None:
    row = Row(kind="shards", store="s3", mode="gone", operations=7, trials=(), seconds=1.0)
    assert "0 of 7" in table([row])
