"""What is left over is found and said; what anything needs, what is not ours, and what a run works on stays."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fleetpress.jobs.cli import main
from fleetpress.jobs.gc import Leftovers, delete_leftovers, find_leftovers
from fleetpress.jobs.ledger import Ledger
from fleetpress.jobs.runs.heartbeat import (
    DEAD_SECONDS,
    alive_key,
    cancel_key,
)
from fleetpress.jobs.runs.results import FleetResult, write_summary
from fleetpress.jobs.tasks import Output, TaskRecord
from fleetpress.storage.store import ObjectStore, open_store

OLD, NEW, OPEN = "a" * 32, "b" * 32, "c" * 32


class World:
    """A clock, and what happens while somebody waits."""

    def __init__(self, meanwhile: Callable[[float], object] = lambda now: None) -> None:
        self.now = 0.0
        self._meanwhile = meanwhile

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile(self.now)


def put(store: ObjectStore, *keys: str) -> None:
    for key in keys:
        store.put(key, b"0123456789")


def look(store: ObjectStore, world: World | None = None, *, superseded: bool = False) -> Leftovers:
    world = world or World()
    return find_leftovers(store, superseded=superseded, clock=world.clock, sleep=world.sleep)


def told(leftovers: Leftovers) -> set[tuple[str, str]]:
    return {(item.what, item.key) for item in leftovers.found}


def artifact(store: ObjectStore, name: str, digest: str, *, files: Iterable[str] = ("model.pt2",)) -> None:
    put(store, *(f"models/{name}/{digest}/{file}" for file in (*files, "manifest.json")))


def point(store: ObjectStore, name: str, digest: str) -> None:
    store.put(f"models/{name}/latest.json", json.dumps({"digest": digest, "run": "r"}).encode())


def crumbs(store: ObjectStore, digest: str, shard: str, *, recorded: bool = True) -> None:
    put(store, f"records/{digest}.crumbs")
    if recorded:
        outputs = (
            Output(key=shard, bytes=5, sha256="", upload="u"),
            Output(key=f"records/{digest}.crumbs", bytes=10, sha256=""),
        )
        record = TaskRecord(
            task="m/convert",
            model="m",
            kind="convert",
            digest=digest,
            outputs=outputs,
            result={},
            seconds=1.0,
            fleetpress_version="0",
        )
        Ledger(store).write(record)


def begin(store: ObjectStore, run: str, *, state: str = "done") -> None:
    write_summary(store, FleetResult(run=run, state=state, name="n", output="o", models=()))  # type: ignore[arg-type]


@pytest.fixture
def healthy(store: ObjectStore) -> ObjectStore:
    """An output in which everything is needed, beside things that are not ours."""
    for name in ("m", "group/m", f"group/{OPEN}"):
        artifact(store, name, OLD, files=("model.safetensors", "sub/config.json"))
        point(store, name, OLD)
    put(
        store,
        f"records/{OPEN}.pt2",
        f"records/{OPEN}.safetensors",
        "runs/r/report.html",
        "runs/r/events.jsonl",
    )
    put(store, "sources/m/model.pt2", f"sources/{OLD}/model.pt2", "fleetpress.yaml", "models/readme.txt")
    begin(store, "r")
    return store


def test_nothing_is_left_over_where_all_is_well(
    healthy: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = healthy.sizes()
    world = World()
    found = look(healthy, world, superseded=True)
    assert (found.found, found.busy, world.now) == ((), (), 0)
    assert main(["gc", healthy.uri, "--delete", "--superseded"]) == 0
    assert capsys.readouterr().out == "nothing is left over\n"
    assert healthy.sizes() == before


def test_an_output_that_does_not_exist_has_no_leftovers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gc", str(tmp_path / "nowhere")]) == 0
    assert capsys.readouterr().out == "nothing is left over\n"


def litter(store: ObjectStore) -> set[tuple[str, str]]:
    """Leave one of everything; what should be found."""
    put(store, f"models/m/{OPEN}/model-1.safetensors", f"models/m/{OPEN}/model-2.safetensors")
    put(store, f"models/group/m/{NEW}/metrics.json", "fleetpress-probe-123")
    store.create_upload(f"models/m/{OPEN}/model-3.safetensors")
    store.create_upload(f"models/m/{OLD}/model-1.safetensors")
    store.create_upload("sources/somebody.bin")
    crumbs(store, "1" * 32, f"models/m/{OPEN}/model-3.safetensors")
    crumbs(store, "2" * 32, f"models/m/{OLD}/model-1.safetensors")
    crumbs(store, "3" * 32, "", recorded=False)
    store.put(f"leases/{OPEN}/000001", b'{"run": "dead", "token": 1}')
    store.put(f"leases/{OPEN}/000002", b"torn")
    begin(store, "dead", state="running")
    put(store, alive_key("dead"), cancel_key("dead"))
    return {
        ("files without manifest", f"models/m/{OPEN}"),
        ("files without manifest", f"models/group/m/{NEW}"),
        ("probe", "fleetpress-probe-123"),
        *(("crumbs", f"records/{digit * 32}.crumbs") for digit in "123"),
        ("lease", f"leases/{OPEN}/000001"),
        ("lease", f"leases/{OPEN}/000002"),
        ("sign of life", alive_key("dead")),
        ("wish to cancel", cancel_key("dead")),
    }


def test_everything_that_is_left_over_is_found_and_goes(healthy: ObjectStore) -> None:
    before = healthy.sizes()
    expected = litter(healthy)
    world = World()
    found = look(healthy, world)
    assert found.busy == ()
    assert DEAD_SECONDS <= world.now < DEAD_SECONDS + 5
    uploads = [item for item in found.found if item.what == "upload"]
    assert told(found) - {(item.what, item.key) for item in uploads} == expected
    assert sorted(item.resumable for item in uploads) == [False, True]
    by_key = {item.key: item for item in found.found}
    files = by_key[f"models/m/{OPEN}"]
    assert (files.bytes, files.resumable) == (20, True)
    assert by_key[f"records/{'1' * 32}.crumbs"].resumable
    assert not by_key[f"records/{'2' * 32}.crumbs"].resumable
    assert "no record" in by_key[f"records/{'3' * 32}.crumbs"].why
    assert "run dead does not live" in by_key[f"leases/{OPEN}/000001"].why
    records = {key: size for key, size in healthy.sizes("records/").items() if key.endswith(".json")}

    assert healthy.sizes().keys() > before.keys(), "finding deletes nothing"
    deleted = delete_leftovers(healthy, found)
    assert all(item.deleted for item in deleted.found)
    summary = {"runs/dead/summary.json": healthy.sizes("runs/")["runs/dead/summary.json"]}
    assert healthy.sizes() == before | records | summary
    assert [item.key.rpartition("/")[2] for item in healthy.list_unfinished()] in (
        ["somebody.bin"],
        ["sources"],  # a folder knows where the upload is, not what for
    )
    again = look(healthy)
    assert again.found == ()


def test_what_a_living_run_may_need_is_kept(healthy: ObjectStore) -> None:
    expected = litter(healthy)
    begin(healthy, "living", state="running")
    put(healthy, alive_key("living"))
    healthy.put(f"leases/{NEW}/000001", b'{"run": "living"}')
    world = World(lambda now: healthy.put(alive_key("living"), str(now).encode()))
    found = look(healthy, world)
    assert found.busy == ("living",)
    kept = {(item.what, item.key) for item in found.found if item.kept}
    dead = {"lease", "sign of life", "wish to cancel"}
    assert {what for what, _ in kept}.isdisjoint(dead)
    assert {pair for pair in expected if pair[0] not in dead} <= kept
    assert ("lease", f"leases/{NEW}/000001") not in told(found)
    delete_leftovers(healthy, found)
    left = healthy.sizes()
    assert {
        f"models/m/{OPEN}/model-1.safetensors",
        f"leases/{NEW}/000001",
        alive_key("living"),
    } <= left.keys()
    assert not {f"leases/{OPEN}/000001", alive_key("dead"), cancel_key("dead")} & left.keys()


def test_a_run_that_ends_while_we_look_may_just_have_published(healthy: ObjectStore) -> None:
    put(healthy, f"models/m/{NEW}/model.pt2")
    begin(healthy, "ending", state="running")
    put(healthy, alive_key("ending"))
    found = look(healthy, World(lambda now: healthy.delete(alive_key("ending"))))
    assert found.busy == ("ending",)
    assert [item.kept for item in found.found] == [True]


def test_a_run_that_begins_while_we_look_is_seen(
    healthy: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(healthy, f"models/m/{NEW}/model.pt2")
    listing = type(healthy).list_unfinished

    def meanwhile(store: ObjectStore) -> object:
        begin(healthy, "new", state="running")
        return listing(store)  # type: ignore[arg-type]

    monkeypatch.setattr(type(healthy), "list_unfinished", meanwhile)
    found = look(healthy)
    assert found.busy == ("new",)
    assert [item.kept for item in found.found] == [True]


def test_a_run_that_begins_after_we_looked_keeps_its_work(healthy: ObjectStore) -> None:
    put(healthy, f"models/m/{NEW}/model.pt2")
    healthy.put(f"leases/{OLD}/000001", b'{"run": "dead"}')
    found = look(healthy)
    begin(healthy, "new", state="running")
    done = delete_leftovers(healthy, found)
    assert {item.what: (item.kept, item.deleted) for item in done.found} == {
        "files without manifest": (True, False),
        "lease": (False, True),
    }
    assert f"models/m/{NEW}/model.pt2" in healthy.sizes()


def test_superseded_artifacts_go_only_when_asked_for(healthy: ObjectStore) -> None:
    artifact(healthy, "m", NEW, files=("model.pt2", "sub/x"))
    point(healthy, "m", NEW)
    assert look(healthy).found == ()
    found = look(healthy, superseded=True)
    (item,) = found.found
    assert (item.what, item.key, item.bytes) == ("superseded artifact", f"models/m/{OLD}", 30)
    assert item.keys[0] == f"models/m/{OLD}/manifest.json"
    delete_leftovers(healthy, found)
    assert not healthy.sizes(f"models/m/{OLD}/")
    assert len(healthy.sizes(f"models/m/{NEW}/")) == 3


@pytest.mark.parametrize("pointer", [None, b"{", b"[]", json.dumps({"digest": OPEN}).encode()])
def test_without_a_pointer_that_leads_somewhere_nothing_is_superseded(
    healthy: ObjectStore, pointer: bytes | None
) -> None:
    artifact(healthy, "m", NEW)
    healthy.delete("models/m/latest.json")
    if pointer is not None:
        healthy.put("models/m/latest.json", pointer)
    assert look(healthy, superseded=True).found == ()


def test_a_torn_write_in_a_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for folder in ("models", "sources"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".fleetpress-tmp-0123").write_bytes(b"x")
    (tmp_path / ".fleetpress-tmp-4567").write_bytes(b"x")
    found = look(store)
    assert told(found) == {
        ("torn write", "models/.fleetpress-tmp-0123"),
        ("torn write", ".fleetpress-tmp-4567"),
    }
    delete_leftovers(store, found)
    assert [path.parent.name for path in tmp_path.rglob(".fleetpress-tmp-*")] == ["sources"]


def test_the_verb_lists_by_default(healthy: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    put(healthy, f"models/m/{OPEN}/model.pt2", "fleetpress-probe-1")
    assert main(["gc", healthy.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "bytes", "key", "why"]
    assert lines[-1] == "2 of 2 leftovers, 20 B: would be deleted with --delete"
    assert main(["gc", healthy.uri, "--json"]) == 0
    items = json.loads(capsys.readouterr().out)["leftovers"]
    assert {(item["key"], item["deleted"]) for item in items} == {
        (f"models/m/{OPEN}", False),
        ("fleetpress-probe-1", False),
    }
    assert main(["gc", healthy.uri, "--delete"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 leftovers, 20 B: deleted"
    assert not healthy.sizes(f"models/m/{OPEN}/")
