"""What is recorded as done for one artifact is not taken for done at another place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fleetpress.jobs import run_fleet
from fleetpress.jobs.artifacts import verify
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.store import open_store


@pytest.mark.parametrize(
    ("old", "new"),
    [("name: net", "name: other"), ("W4A16}", "W4A16}, validate: {max_drop: 0.5}")],
    ids=["name", "limit"],
)
def test_the_same_work_for_another_artifact_is_done_again(old: str, new: str, tmp_path: Path) -> None:
    open_store(str(tmp_path)).put("net.safetensors", save({"a.weight": torch.randn(8, 128).half()}))
    text = (
        f"version: 1\nname: twice\noutput: {tmp_path}/output\n"
        f"models: [{{name: net, source: {tmp_path}/net.safetensors, recipe: w4}}]\n"
        "recipes: {w4: {quantize: {scheme: W4A16}}}\n"
    )
    for one in (text, text.replace(old, new)):
        result = run_fleet(parse_spec(one, "twice.yaml"), executor="inline")
        assert result.models[0].state == "published", result.models[0].reason
        assert verify(f"{result.output}/models/{result.models[0].name}") == []
