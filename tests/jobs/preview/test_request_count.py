"""A run of an unchanged fleet asks as often as `plan` said, to the request; counted on the wire."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from fleetpress.jobs.driver.run import run_fleet
from fleetpress.jobs.handover import store_bytes
from fleetpress.jobs.manifest import companions, complete
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import DETAILED
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.jobs.tables import print_preview
from fleetpress.jobs.tasks import StepResult, Task
from fleetpress.storage.artifact import write_artifact
from fleetpress.storage.s3_client import shared_client
from fleetpress.storage.store import open_store

SPEC = """\
version: 1
name: fleet
output: {place}/output
models:
{models}
data:
  digits: {{train: "{place}/data/train-*.npz", eval: ["{place}/data/test.npz"], loss: cross_entropy}}
recipes:
  small: {{quantize: {{scheme: W4A16}}}}
"""
METRICS = {"before": {"bytes": 8}, "after": {"bytes": 1}, "compression_ratio": 8.0, "bits_per_weight": 4.0}


def no_step(task: Task) -> StepResult:
    """Leaves what a step would, and computes nothing."""
    payload = task.payload
    if task.kind != "publish":
        return StepResult(result={}, outputs=(store_bytes(payload, b"x", ".safetensors"),))
    name, digest = payload["model"]["name"], payload["digest"]
    files = {"model.pt2": b"x", **companions(payload, METRICS)}
    written = write_artifact(open_store(payload["output"]), name, digest, files)
    return complete(payload, METRICS, kind="program", form="pt2", files=written)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks because time goes by is not predicted."""
    monkeypatch.setattr("fleetpress.jobs.runs.heartbeat.BEAT_SECONDS", 1000.0)
    monkeypatch.setattr("fleetpress.jobs.runs.results._SUMMARY_SECONDS", 1000.0)
    monkeypatch.setattr("fleetpress.jobs.driver.run.run_step", no_step)
    numbers = count()  # runs that begin in the same second have ids in their order
    order = SimpleNamespace(token_hex=lambda size: f"{next(numbers):0{2 * size}x}")
    monkeypatch.setattr("fleetpress.jobs.driver.run.secrets", order)


@pytest.fixture
def wire() -> Iterator[Counter[str]]:
    """Requests that leave this process, by kind."""
    seen: Counter[str] = Counter()
    counting = threading.Lock()

    def note(request: Any, **_: object) -> None:
        kind = request.method
        if kind == "GET" and "list-type=2" in request.url:
            kind = "LIST"
        elif kind == "PUT" and "If-None-Match" in request.headers:
            kind = "conditional PUT"
        with counting:  # several threads ask
            seen[kind] += 1

    events = shared_client().meta.events
    events.register("before-send.s3", note)
    yield seen
    events.unregister("before-send.s3", note)


def fleet(place: str, models: int) -> Spec:
    """Programs that a pattern finds, one that is named, one in a folder of its own, and data that two of them use."""
    store = open_store(place)
    for index in range(models - 2):
        store.put(f"models/m{index:03}.pt2", b"%d" % index)
    for key in (
        "other/named.pt2",
        "folder/model.pt2",
        "data/train-0.npz",
        "data/train-1.npz",
        "data/test.npz",
    ):
        store.put(key, key.encode())
    sources = (f"{place}/models/*.pt2", f"{place}/other/named.pt2", f"{place}/folder/")
    entries = "\n".join(f'  - {{source: "{source}", data: digits, recipe: small}}' for source in sources)
    return parse_spec(SPEC.format(place=place, models=entries), "spec.yaml")


def predicted_and_made(spec: Spec, wire: Counter[str]) -> tuple[dict[str, int], dict[str, int]]:
    found = preview(spec).requests
    assert found is not None
    wire.clear()
    result = run_fleet(spec, executor="inline")
    assert {model.state for model in result.models} == {"unchanged"}
    return dict(found), dict(wire)


@pytest.mark.parametrize("models", [3, 12])
def test_plan_predicts_every_request(
    models: int, s3_uri: str, wire: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DETAILED == 50
    for module in ("runs.results", "preview.request_count"):  # so that twelve models are many
        monkeypatch.setattr(f"fleetpress.jobs.{module}.DETAILED", 10)
    spec = fleet(s3_uri, models)
    assert preview(spec).requests is None
    assert run_fleet(spec, executor="inline").exit_code == 0
    for _ in range(2):  # another summary lies there the second time
        predicted, made = predicted_and_made(spec, wire)
        assert predicted == made
    assert made["GET"] == (7 if models == 3 else 23)


def test_pointers_to_mend_numbers_to_read_and_runs_that_never_ended(s3_uri: str, wire: Counter[str]) -> None:
    spec = fleet(s3_uri, 12)
    first = run_fleet(spec, executor="inline")
    store = open_store(spec.output)
    summary = json.loads(store.get(f"runs/{first.run}/summary.json"))
    del summary["models"][3:]
    store.put(f"runs/{first.run}/summary.json", json.dumps(summary).encode())
    store.put(f"runs/{first.run}z/summary.json", json.dumps({**summary, "state": "running"}).encode())
    store.put(f"runs/{first.run}y/summary.json", b"torn")
    store.put("models/m009/latest.json", b'{"digest": "of an older recipe"}')
    store.delete("models/named/latest.json")
    predicted, made = predicted_and_made(spec, wire)
    assert predicted == made
    assert made["PUT"] == 8


def test_listings_of_many_pages(s3_uri: str, wire: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetpress.jobs.preview.request_count.PAGE_KEYS", 7)

    def short_pages(params: dict[str, Any], **_: object) -> None:
        params["MaxKeys"] = 7

    events = shared_client().meta.events
    spec = fleet(s3_uri, 16)  # 14 match the pattern: two full pages
    assert run_fleet(spec, executor="inline").exit_code == 0
    events.register("provide-client-params.s3.ListObjectsV2", short_pages)
    try:
        predicted, made = predicted_and_made(spec, wire)
    finally:
        events.unregister("provide-client-params.s3.ListObjectsV2", short_pages)
    assert predicted == made
    assert made["LIST"] > 10


def test_plan_says_it(s3_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = fleet(s3_uri, 3)
    print_preview(preview(spec))
    assert "a run asks" not in capsys.readouterr().out
    run_fleet(spec, executor="inline")
    print_preview(preview(spec))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "nothing to do: a run asks the storage 23 times: 1 DELETE, 7 GET, 5 HEAD, 4 LIST, 6 PUT"
    assert preview(spec).as_dict()["requests"] == {"DELETE": 1, "GET": 7, "HEAD": 5, "LIST": 4, "PUT": 6}


def test_nothing_is_predicted_of_a_fleet_with_problems(s3_uri: str) -> None:
    spec = fleet(s3_uri, 3)
    run_fleet(spec, executor="inline")
    open_store(s3_uri).delete("other/named.pt2")
    found = preview(spec)
    assert len(found.problems) == 1
    assert found.requests is None
