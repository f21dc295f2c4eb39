"""An interrupted run, then `gc --delete`, then the resume: nothing of it is left, and the result is the same bytes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fleetpress.jobs import run_fleet
from fleetpress.jobs.artifacts import verify
from fleetpress.jobs.checkpoint import layout
from fleetpress.jobs.cli import main
from fleetpress.jobs.gc import find_leftovers
from fleetpress.jobs.runs.events import Event
from fleetpress.jobs.runs.progress import Progress
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.store import ObjectStore, open_store

SPEC = """\
version: 1
name: left
output: {place}/{output}
models: [{{name: net, source: "{place}/net.safetensors", recipe: w4}}]
recipes: {{w4: {{quantize: {{scheme: W4A16}}}}}}
"""


def spec_of(place: str, output: str) -> Spec:
    return parse_spec(SPEC.format(place=place, output=output), "left.yaml")


def artifact_of(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.sizes("models/") if "/net/" in key and "latest" not in key}


@pytest.mark.parametrize("tasks", [2, 3])
def test_a_resume_without_what_gc_took_away(
    tasks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(tmp_path)
    monkeypatch.setattr(layout, "TASK_BYTES", 256 << 10)  # one shard, made by several tasks
    monkeypatch.setattr(layout, "PART_BYTES", 64 << 10)
    torch.manual_seed(0)
    weights = {f"l{i}.weight": torch.randn(256, 512).half() for i in range(3)}
    weights |= {f"l{i}.norm": torch.ones(64).half() for i in range(3)}
    open_store(place).put("net.safetensors", save(weights))
    quiet = run_fleet(spec_of(place, "quiet"), executor="inline")
    assert quiet.exit_code == 0, quiet.models[0].reason
    ended = 0

    def stop(event: Event, _: Progress) -> None:
        nonlocal ended
        ended += event.kind == "finished"
        if ended == tasks:
            raise KeyboardInterrupt

    spec = spec_of(place, "output")
    store = open_store(spec.output)
    assert run_fleet(spec, executor="inline", listener=stop).state == "interrupted"
    left = find_leftovers(store)
    assert {item.what for item in left.found} == {"upload", "crumbs"}
    assert all(item.resumable for item in left.found)

    assert main(["gc", spec.output, "--delete"]) == 0
    assert find_leftovers(store).found == ()
    again = run_fleet(spec, executor="inline")
    assert again.exit_code == 0, again.models[0].reason
    assert artifact_of(store) == artifact_of(open_store(quiet.output))
    assert verify(f"{spec.output}/models/net") == []
    done = find_leftovers(store)
    assert {item.what for item in done.found} == {"crumbs"}  # of the shard that is finished
    assert not any(item.resumable for item in done.found)
    assert main(["gc", spec.output, "--delete"]) == 0
    assert run_fleet(spec, executor="inline").models[0].state == "unchanged"
