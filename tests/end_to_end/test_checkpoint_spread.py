"""One shard made by many tasks: on any number of workers and nodes, after interruptions and deaths, the same bytes."""

import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save

from fleetpress.compression import kernels
from fleetpress.jobs import run_fleet
from fleetpress.jobs.artifacts import verify
from fleetpress.jobs.checkpoint import layout as checkpoint_layout
from fleetpress.jobs.driver.run import Event
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage import store as stores
from fleetpress.storage.local import FolderStore
from fleetpress.storage.store import ObjectStore, open_store

# Parts as small as S3 takes them, so that 50 MB are several tasks of several parts.
SIZES = {"TASK_BYTES": 16 << 20, "PART_BYTES": 5 << 20}
SPEC = """\
version: 1
name: spread
output: {output}
models: [{{source: "{source}", recipe: w8}}]
recipes: {{w8: {{quantize: {{scheme: W8A16_ASYM}}}}}}
"""


def write_model(store: ObjectStore, key: str = "net.safetensors") -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (600, 2048),
        "norm.weight": (2048,),
        "huge.weight": (8192, 2048),
        **{f"layers.{index}.weight": (1024, 2048) for index in range(4)},
    }
    model = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    store.put(key, save(model))


def spec_of(source: str, output: str) -> Spec:
    return parse_spec(SPEC.format(source=source, output=output), "spec.yaml")


def files(output: str) -> dict[str, bytes]:
    store = open_store(f"{output}/models")
    return {info.key: store.get(info.key) for info in store.list() if not info.key.endswith("latest.json")}


@pytest.fixture(scope="module", autouse=True)
def small_tasks() -> Iterator[None]:
    with patch.multiple(checkpoint_layout, **SIZES):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("spread"))
    write_model(open_store(folder))
    return f"{folder}/net.safetensors"


@pytest.fixture(scope="module")
def quiet(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run in one process publishes."""
    output = str(tmp_path_factory.mktemp("quiet"))
    done = run_fleet(spec_of(source, output), executor="inline")
    assert [model.state for model in done.models] == ["published"]
    assert verify(f"{output}/models/net", deep=True) == []
    records = [info.key for info in open_store(output).list("records/") if info.key.endswith(".json")]
    assert len(records) > 5  # open, several converts, finish, assemble
    return files(output)


def stop_after(kind: str, count: int) -> Callable[[Event, FleetResult], None]:
    """Ctrl-C once so many tasks of a kind are done."""
    seen = 0

    def listener(event: Event, _: FleetResult) -> None:
        nonlocal seen
        if event.kind == "finished" and kind in (event.task or ""):
            seen += 1
            if seen == count:
                raise KeyboardInterrupt

    return listener


def started(tasks: list[str]) -> Callable[[Event, FleetResult], None]:
    return lambda event, _: tasks.append(event.task or "") if event.kind == "started" else None


@pytest.fixture(params=["folder", "seaweed"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty output, once a folder and once on a real S3 server."""
    return str(tmp_path / "out") if request.param == "folder" else str(request.getfixturevalue("seaweed_uri"))


@pytest.fixture
def flips(source: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the source in which a bit flips on its way here, each once; its folder keeps checksums, as S3 does."""
    waiting: list[int] = []
    read_into, home = FolderStore.read_into, str(Path(source).parent)

    def flipping(
        store: FolderStore, key: str, start: int, buffer: memoryview, *, etag: str | None = None
    ) -> None:
        read_into(store, key, start, buffer, etag=etag)
        for at in [at for at in waiting if store.uri == home and start <= at < start + len(buffer)]:
            buffer[at - start] ^= 1
            waiting.remove(at)

    def kept(store: FolderStore, key: str, *, etag: str) -> tuple[int, int]:
        data = store.get(key, etag=etag)
        return len(data), zlib.crc32(data)

    monkeypatch.setattr(FolderStore, "read_into", flipping)
    monkeypatch.setattr(FolderStore, "stored_crc32", kept)
    return waiting


def test_a_bit_that_flips_on_its_way_in_is_noticed_and_read_anew(
    source: str, tmp_path: Path, quiet: dict[str, bytes], flips: list[int]
) -> None:
    spec = spec_of(source, str(tmp_path))
    flips.append(30_000_000)  # the last bits of a weight: no check of values would see it
    [failed] = run_fleet(spec, executor="inline").models
    assert flips == []
    assert failed.state == "failed"
    assert "net.safetensors: its bytes were damaged on their way here" in failed.reason
    assert files(str(tmp_path)) == {}
    tasks: list[str] = []
    again = run_fleet(spec, executor="inline", listener=started(tasks))
    assert [model.state for model in again.models] == ["published"]
    assert sum("convert" in task for task in tasks) > 1
    assert files(str(tmp_path)) == quiet


def test_an_interrupted_run_goes_on_where_it_was(source: str, output: str, quiet: dict[str, bytes]) -> None:
    spec = spec_of(source, output)
    stopped = run_fleet(spec, executor="inline", listener=stop_after("convert", 2))
    assert stopped.state == "interrupted"
    assert not any("safetensors" in info.key for info in open_store(output).list("models/"))
    tasks: list[str] = []
    assert run_fleet(spec, executor="inline", listener=started(tasks)).exit_code == 0
    assert "net/open" not in tasks
    (planned,) = preview(spec_of(source, f"{output}-2")).models
    assert planned.forecast is not None
    assert sum("convert" in task for task in tasks) <= planned.forecast["tasks"] - 2
    assert files(output) == quiet


def test_an_upload_that_is_gone_is_begun_again(source: str, output: str, quiet: dict[str, bytes]) -> None:
    """Buckets are often told to drop unfinished uploads after some days."""
    spec = spec_of(source, output)
    run_fleet(spec, executor="inline", listener=stop_after("convert", 2))
    store = open_store(output)
    for info in store.list("records/"):
        if info.key.endswith(".json"):
            for one in json.loads(store.get(info.key))["outputs"]:
                if one["upload"]:
                    store.abort_upload(one["key"], one["upload"])
    assert run_fleet(spec, executor="inline").exit_code == 0
    assert files(output) == quiet


def test_a_shard_that_was_completed_but_not_recorded_is_found(
    source: str, output: str, quiet: dict[str, bytes]
) -> None:
    spec = spec_of(source, output)
    run_fleet(spec, executor="inline")
    store = open_store(output)
    for info in store.list():
        is_record = info.key.startswith("records/") and info.key.endswith(".json")
        kind = json.loads(store.get(info.key))["kind"] if is_record else None
        if info.key.endswith("manifest.json") or kind in ("finish", "assemble"):
            store.delete(info.key)
    tasks: list[str] = []
    assert run_fleet(spec, executor="inline", listener=started(tasks)).exit_code == 0
    assert tasks == ["net/finish[0]", "net/assemble"]
    assert files(output) == quiet


def test_bytes_that_came_out_otherwise_are_not_published(source: str, tmp_path: Path) -> None:
    """A part that the disk or the server altered: the shard is thrown away, the next run makes it anew."""
    spec = spec_of(source, str(tmp_path))
    run_fleet(spec, executor="inline", listener=stop_after("convert", 3))
    (unfinished,) = tmp_path.glob("models/net/*/.fleetpress-tmp-*")
    with unfinished.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"altered")
    failed = run_fleet(spec, executor="inline").models[0]
    assert failed.state == "failed"
    assert "reads back differently" in (failed.reason or "")
    assert not list(tmp_path.glob("models/net/*/manifest.json"))
    assert run_fleet(spec, executor="inline").exit_code == 0
    assert verify(f"{tmp_path}/models/net") == []


def test_without_the_compiled_kernel_the_same_bytes_come_out(
    source: str, tmp_path: Path, quiet: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEETPRESS_NO_KERNELS", "1")
    assert not kernels.available()
    assert run_fleet(spec_of(source, str(tmp_path)), executor="inline").exit_code == 0
    assert files(str(tmp_path)) == quiet


def test_a_small_ceiling_changes_no_byte(source: str, tmp_path: Path, quiet: dict[str, bytes]) -> None:
    text = SPEC.format(source=source, output=tmp_path) + "resources: {memory_per_task: 192MiB}\n"
    spec = parse_spec(text, "spec.yaml")
    (planned,) = preview(spec).models
    assert planned.forecast is not None
    assert planned.forecast["memory_bytes"] <= 192 << 20
    assert run_fleet(spec, executor="inline").exit_code == 0
    assert files(str(tmp_path)) == quiet


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self, store: ObjectStore, counts: Counter[str]) -> None:
        self._store, self._counts = store, counts

    def __getattr__(self, name: str) -> object:
        method = getattr(self._store, name)
        if name not in ("read_into", "upload_part", "put", "put_if_absent", "get"):
            return method

        def counted(key: str, *args: object, **options: object) -> object:
            kind = "shard" if "models/" in key else "source" if key.startswith("net") else "record"
            suffix = key.rpartition(".")[2]
            self._counts[f"{name} {kind} {suffix}"] += 1
            return method(key, *args, **options)

        return counted


def test_the_plan_knows_how_many_requests_there_will_be(source: str, output: str) -> None:
    spec = spec_of(source, output)
    (planned,) = preview(spec).models
    expected = planned.forecast
    assert expected is not None
    counts: Counter[str] = Counter()
    original = stores._new_store
    with patch.multiple(stores, _new_store=lambda place: Counting(original(place), counts), _stores={}):
        assert run_fleet(spec, executor="inline").exit_code == 0
    assert counts["read_into source safetensors"] == expected["source_ranges"]
    assert counts["upload_part shard safetensors"] == expected["uploads"]
    assert counts["read_into shard safetensors"] == expected["uploads"]
    assert counts["put record crumbs"] == expected["crumbs"]


def test_two_workers_give_the_same_bytes(
    source: str, tmp_path: Path, quiet: dict[str, bytes], ray_cluster: None
) -> None:
    assert run_fleet(spec_of(source, str(tmp_path)), executor="ray").exit_code == 0
    assert files(str(tmp_path)) == quiet


NODES = """
import os, sys, time
from unittest.mock import patch
import ray
from ray.cluster_utils import Cluster
from fleetpress.jobs import run_fleet
from fleetpress.jobs.checkpoint import layout as checkpoint_layout
from fleetpress.jobs.executors import open_executor
from fleetpress.jobs.spec.fleet_spec import load_spec
from fleetpress.jobs.tasks import Failure, Task

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=2)]
done = []

def listener(event, result):
    if event.kind == "finished" and "convert" in event.task:
        done.append(event.task)
        if len(done) == 1:  # of the two on the larger node one at least is under way
            cluster.remove_node(nodes.pop(), allow_graceful=False)

with patch.multiple(checkpoint_layout, TASK_BYTES=16 << 20, PART_BYTES=5 << 20):
    result = run_fleet(load_spec(sys.argv[1]), executor="ray", address=cluster.address, listener=listener)
print("result", result.exit_code, len(nodes), len(done) == len(set(done)), [m.reason for m in result.models])

def step(task):
    open(task.payload["mark"], "w").close()
    time.sleep(60)

ray.init(address=cluster.address, ignore_reinit_error=True)
deadline = time.monotonic() + 60
while ray.cluster_resources().get("CPU") != 1:  # the run may end before Ray sees that a node is gone
    assert time.monotonic() < deadline, ray.cluster_resources()
    time.sleep(0.1)
executor = open_executor("ray", step, sys.argv[2], address=cluster.address)
assert executor.slots == 1, executor.slots
mark = sys.argv[2] + "/mark"
executor.submit(Task(id="a", model="m", kind="quantize", digest="a", payload={"mark": mark}))
deadline = time.monotonic() + 60
while not os.path.exists(mark):
    assert time.monotonic() < deadline
    time.sleep(0.05)
cluster.remove_node(nodes.pop(), allow_graceful=False)
[(_, failure)] = executor.wait(30)
assert isinstance(failure, Failure) and failure.error_class == "lost", failure
print(failure.reason)
executor.close()
assert ray.is_initialized()  # a cluster that was there before stays
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
def test_a_node_that_dies_takes_its_tasks_only(source: str, tmp_path: Path, quiet: dict[str, bytes]) -> None:
    """First a run of which one of two nodes dies, then a task whose only node dies: in one cluster of its own."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.format(source=source, output=tmp_path / "out"))
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short enough for the paths of Ray's sockets
        # In the usual folder, the cluster would leave its address for every later `ray.init()` of this machine.
        result = subprocess.run(
            [sys.executable, "-c", NODES, str(spec), str(tmp_path)],
            env={**os.environ, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    assert "result 0 1 True [None]" in result.stdout.splitlines(), result.stdout[-2000:]
    assert "its node died" in result.stdout
    assert files(str(tmp_path / "out")) == quiet
