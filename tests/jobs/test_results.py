"""What a run says of itself: exit codes, summaries, and which run is the latest."""

import pytest

from fleetpress.jobs.results import FleetResult, ModelResult, counts, read_result, run_ids, write_summary
from fleetpress.storage.errors import ArtifactCorrupt, ObjectNotFound
from fleetpress.storage.store import ObjectStore


def result(*states: str, run: str = "r1", state: str = "done", unreachable: bool = False) -> FleetResult:
    models = tuple(
        ModelResult(name=f"m{index}", state=name, unreachable=unreachable)  # type: ignore[arg-type]
        for index, name in enumerate(states)
    )
    return FleetResult(run=run, state=state, name="fleet", output="out", models=models)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (("published", "unchanged"), 0),
        (("published", "rejected"), 3),
        (("unchanged", "failed"), 3),
        (("rejected", "failed"), 4),
        (("failed",), 4),
    ],
)
def test_exit_code(states: tuple[str, ...], code: int) -> None:
    assert result(*states).exit_code == code


def test_exit_code_of_a_store_that_was_never_reached_and_of_an_interruption() -> None:
    assert result("failed", "failed", unreachable=True).exit_code == 5
    assert result("published", state="interrupted").exit_code == 130


def test_summaries_are_read_back_and_the_latest_is_the_default(store: ObjectStore) -> None:
    for run in ("20260102T000000Z-aa", "20260101T000000Z-bb"):
        write_summary(store, result("published", run=run))
    assert run_ids(store) == ["20260101T000000Z-bb", "20260102T000000Z-aa"]
    assert read_result(store).run == "20260102T000000Z-aa"
    assert read_result(store, "20260101T000000Z-bb") == result("published", run="20260101T000000Z-bb")


def test_unknown_runs_and_damaged_summaries_are_told(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFound, match="holds no runs"):
        read_result(store)
    store.put("runs/r1/summary.json", b'{"run": 1}')
    with pytest.raises(ObjectNotFound, match="holds no run 'r2'; it holds r1"):
        read_result(store, "r2")
    with pytest.raises(ArtifactCorrupt, match="no run summary"):
        read_result(store)


def test_counts_keep_the_order_of_appearance() -> None:
    assert list(counts(result("failed", "published", "failed").models).items()) == [
        ("failed", 2),
        ("published", 1),
    ]
