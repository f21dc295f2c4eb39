"""What a run takes over from another that works on the same output."""

import threading
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save

from fleetpress.jobs import run_fleet
from fleetpress.jobs.driver import run
from fleetpress.jobs.driver.leases import Lease, Leases
from fleetpress.jobs.driver.run import Event, Listener
from fleetpress.jobs.executors.inline import InlineExecutor
from fleetpress.jobs.ledger import Ledger
from fleetpress.jobs.runs.published import find_published
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.store import ObjectStore, open_store

SPEC = """\
version: 1
name: shared
output: {place}/output
models: [{{source: "{place}/one.safetensors", recipe: w8}}, {{source: "{place}/two.safetensors", recipe: w8}}]
recipes: {{w8: {{quantize: {{scheme: W8A16_ASYM}}}}}}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """Two checkpoints of two tasks each."""
    store = open_store(str(tmp_path))
    for name in ("one", "two"):
        store.put(f"{name}.safetensors", save({"up.weight": torch.full((4, 8), float(len(name)))}))
    return parse_spec(SPEC.format(place=tmp_path), "spec.yaml")


def run_beside(spec: Spec, first_run: Spec) -> tuple[FleetResult, list[str]]:
    """A run of `spec` while another begins and ends, after this one has listed records and before its first lease."""
    take = Leases.take
    started: list[str] = []

    def after_the_other(leases: Leases, digest: str) -> Lease | None:
        with patch.object(Leases, "take", take):
            assert run_fleet(first_run, executor="inline").exit_code == 0
        Leases.take = take  # type: ignore[method-assign] # only the first call waits
        return leases.take(digest)

    with patch.object(Leases, "take", after_the_other):
        return run_fleet(spec, executor="inline", listener=note_starts(started)), started


def note_starts(started: list[str]) -> Listener:
    """A listener that adds the ids of tasks as they start."""

    def listener(event: Event, _: object) -> None:
        if event.kind == "started":
            started.append(str(event.task))

    return listener


def test_what_another_run_has_done_since_the_listing_is_not_done_again(spec: Spec) -> None:
    result, started = run_beside(spec, spec)
    assert started == []
    assert [model.state for model in result.models] == ["published", "published"]


def test_what_another_run_publishes_before_the_listing_is_not_done_again(spec: Spec) -> None:
    """This run has asked for manifests, then the other one does everything, then this one lists the records."""

    def before_the_other(store: ObjectStore, digests: Mapping[str, str]) -> set[str]:
        found = find_published(store, digests)
        with patch.object(run, "find_published", find_published):
            assert run_fleet(spec, executor="inline").exit_code == 0
        return found

    started: list[str] = []
    with patch.object(run, "find_published", before_the_other):
        result = run_fleet(spec, executor="inline", listener=note_starts(started))
    assert started == []
    assert [model.state for model in result.models] == ["published", "published"]


def test_what_it_has_left_is_done(spec: Spec) -> None:
    result, started = run_beside(spec, spec.model_copy(update={"models": spec.models[:1]}))
    assert sorted(started) == ["two/assemble", "two/convert[0]"]
    assert [model.state for model in result.models] == ["published", "published"]


def test_an_artifact_that_was_deleted_by_hand_is_made_again(spec: Spec) -> None:
    run_fleet(spec, executor="inline")
    store = open_store(spec.output)
    for key in store.sizes("models/one/"):
        store.delete(key)
    assert run_fleet(spec, executor="inline").exit_code == 0
    assert any(key.endswith("/manifest.json") for key in store.sizes("models/one/"))


def test_records_are_looked_for_once_a_lease(spec: Spec) -> None:
    """Of a run that died: every task would otherwise ask for all tasks of its model."""
    with patch.object(Leases, "release", return_value=True):  # its leases stay behind
        run_fleet(spec, executor="inline", listener=_stop_at_once)
    find_all = Ledger.find_all
    asked: list[bool] = []

    def counted(ledger: Ledger, tasks: object, *, again: bool = False) -> object:
        asked.append(again)
        return find_all(ledger, tasks, again=again)  # type: ignore[arg-type]

    with patch.object(Ledger, "find_all", counted):
        assert run_fleet(spec, executor="inline").exit_code == 0
    assert asked.count(True) == 1


def _stop_at_once(event: Event, _: object) -> None:
    if event.kind == "started":
        raise KeyboardInterrupt


def test_leases_of_several_models_are_asked_for_at_once(spec: Spec) -> None:
    take, both = Leases.take, threading.Barrier(2, timeout=30)

    def together(leases: Leases, digest: str) -> Lease | None:
        both.wait()  # broken, and the run with it, if one waits for the other
        return take(leases, digest)

    with (
        patch.object(InlineExecutor, "slots", property(lambda _: 2)),
        patch.object(Leases, "take", together),
    ):
        assert run_fleet(spec, executor="inline").exit_code == 0
