"""What a run says of itself: exit codes, summaries, and which run is the latest."""

import json

import pytest

from fleetpress.jobs.runs.results import (
    DETAILED,
    FleetResult,
    ModelResult,
    SummaryWriter,
    counts,
    layers_of,
    read_result,
    run_ids,
    summary_key,
    write_summary,
)
from fleetpress.storage.errors import ArtifactCorrupt, ObjectNotFound
from fleetpress.storage.store import ObjectStore, open_store


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
    with pytest.raises(ObjectNotFound, match="holds no run 'r2'; the latest are: r1"):
        read_result(store, "r2")
    with pytest.raises(ArtifactCorrupt, match="no run summary"):
        read_result(store)


def test_counts_keep_the_order_of_appearance() -> None:
    assert list(counts(result("failed", "published", "failed").models).items()) == [
        ("failed", 2),
        ("published", 1),
    ]


def test_a_summary_is_a_line_for_each_model(store: ObjectStore) -> None:
    written = result("published", "failed")
    write_summary(store, written)
    lines = store.get(summary_key("r1")).decode().splitlines()
    assert [json.loads(line.rstrip(","))["name"] for line in lines[1:-1]] == ["m0", "m1"]
    assert json.loads("\n".join(lines)) == written.as_dict()


def test_a_run_that_is_named_is_not_looked_for(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write_summary(store, result("published"))
    monkeypatch.delattr(type(store), "sizes")
    monkeypatch.delattr(type(store), "list")
    assert read_result(store, "r1") == result("published")


class SlowStore:
    """A store whose writes take as long as a test says, by the test's own clock."""

    def __init__(self, put_seconds: float) -> None:
        self.put_seconds = put_seconds
        self.now = 100.0
        self.written: list[float] = []

    def put(self, _key: str, _data: bytes) -> None:
        self.written.append(self.now)
        self.now += self.put_seconds

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(("put_seconds", "apart"), [(0.01, 2.01), (0.1, 2.1), (1.0, 20.0), (30.0, 600.0)])
def test_summaries_are_spaced_by_what_they_cost(put_seconds: float, apart: float) -> None:
    slow = SlowStore(put_seconds)
    writer = SummaryWriter(slow, slow.clock)  # type: ignore[arg-type]
    writer.write(lambda: result("published"))
    while len(slow.written) < 4:
        slow.now += 0.001 * apart
        writer.refresh(lambda: result("published"))
    gaps = [after - before for before, after in zip(slow.written, slow.written[1:], strict=False)]
    assert gaps == pytest.approx([apart] * 3, rel=0.002)
    assert all(put_seconds / gap <= 0.0501 for gap in gaps)


def test_what_it_costs_to_know_the_result_counts_too() -> None:
    slow = SlowStore(0.0)

    def costly() -> FleetResult:
        slow.now += 5.0
        return result("published")

    writer = SummaryWriter(slow, slow.clock)  # type: ignore[arg-type]
    writer.write(costly)
    slow.now += 94.0
    writer.refresh(costly)
    assert len(slow.written) == 1
    slow.now += 1.1
    writer.refresh(costly)
    assert len(slow.written) == 2


def test_a_page_asks_for_the_layers_of_the_largest_models(tmp_path: object) -> None:
    store = open_store(str(tmp_path))
    models = []
    for index in range(DETAILED + 20):
        name = f"m{index}"
        models.append(ModelResult(name=name, state="published", digest="d", before={"bytes": index}))
        store.put(f"models/{name}/d/metrics.json", json.dumps({"layers": [{"name": name}]}).encode())
    models += [ModelResult(name="bad", state="failed", reason="why", before={"bytes": 1e9})]
    fleet = FleetResult(run="r", state="done", name="n", output="o", models=tuple(models))
    found = layers_of(store, fleet)
    assert list(found) == [f"m{index}" for index in range(20, DETAILED + 20)]
    assert found["m20"] == {"layers": [{"name": "m20"}]}


@pytest.mark.parametrize("damage", [None, b"{", b"[]", b"\xff"])
def test_a_page_does_without_metrics_that_cannot_be_read(store: ObjectStore, damage: bytes | None) -> None:
    if damage is not None:
        store.put("models/m/d/metrics.json", damage)
    model = ModelResult(name="m", state="published", digest="d")
    fleet = FleetResult(run="r", state="done", name="n", output="o", models=(model,))
    assert layers_of(store, fleet) == {}
