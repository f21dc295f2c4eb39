"""Another run completes the same shard while this one reads it back: equal bytes in its place are no change."""

import sys
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs import run_fleet
from fleetpress.jobs.artifacts import verify
from fleetpress.jobs.checkpoint import layout, steps
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage import etags, local
from fleetpress.storage import store as stores
from fleetpress.storage.store import ObjectStore

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "crashes"))

from crash_fleets import KINDS, write_sources
from crash_forks import LAYOUT, ONE_PUT_BYTES


class Overtaking:
    """A store in which every range that is read of a shard is one of a shard that has just been written again."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.times = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        if key.startswith("models/"):
            self.times += 1
            self._store.put(key, self._store.get(key))
        self._store.read_into(key, start, buffer, etag=etag)


def test_a_shard_that_another_run_completes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in LAYOUT.items():
        monkeypatch.setattr(layout, name, size)
    monkeypatch.setattr(steps, "ONE_PUT_BYTES", ONE_PUT_BYTES)
    for module in (etags, local):  # as of large files: their etag is their time
        monkeypatch.setattr(module, "HASHED_BELOW_BYTES", 1)
    place = str(tmp_path)
    write_sources(f"{place}/source")
    made: list[Overtaking] = []

    def overtaking(root: str) -> Overtaking:
        made.append(Overtaking(new_store(root)))
        return made[-1]

    new_store = stores._new_store
    with monkeypatch.context() as patch:
        patch.setattr(stores, "_new_store", overtaking)
        patch.setattr(stores, "_stores", {})
        text = KINDS["shards"].spec_text(f"{place}/source", f"{place}/output")
        result = run_fleet(parse_spec(text, "spec.yaml"), executor="inline")
    assert result.exit_code == 0, result.models[0].reason
    assert sum(store.times for store in made) > 5
    assert verify(f"{place}/output/models/language") == []
