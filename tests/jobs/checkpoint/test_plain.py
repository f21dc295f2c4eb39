"""Checkpoints that are quantized already are refused; plans of the others are made without torch."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.checkpoint.choice import check_plain
from fleetpress.jobs.errors import ModelError
from fleetpress.storage.checkpoint import Checkpoint, TensorLocation
from fleetpress.storage.safetensors_header import TensorInfo
from fleetpress.storage.safetensors_layout import header_of_file
from fleetpress.storage.sources import SourceFile

PLAIN = {"a.weight": "F32", "a.bias": "F32", "experts.down_proj": "BF16", "mask": "U8", "steps": "I8"}


def checkpoint(dtypes: Mapping[str, str], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Tensors [4, 4] of one file."""
    file = SourceFile(path="model.safetensors", etag="e", bytes=0)
    found = {
        name: TensorLocation(
            file=file, info=TensorInfo(name=name, dtype=dtype, shape=(4, 4), offset_bytes=0, size_bytes=0)
        )
        for name, dtype in dtypes.items()
    }
    return Checkpoint(
        uri="s3://b/llm", root="s3://b/llm", config=config, tensors=found, files=(file,), other_files=()
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "says by gptq"),
        ({"quantization_config": {"bits": 4}}, "says by unknown"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "says by compressed-tensors"),
    ],
)
def test_a_quantized_checkpoint_is_known_by_its_config(config: dict[str, Any], words: str) -> None:
    with pytest.raises(
        ModelError, match=rf"s3://b/llm is quantized already \(config\.json {words}\); give the"
    ):
        check_plain(checkpoint(PLAIN, config))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.weight", "I8"),
        ("a.weight", "F8_E4M3"),
        ("a.weight", "U8"),
        ("a.weight_packed", "I32"),
        ("a.weight_scale", "BF16"),
        ("a.weight_scale_inv", "F32"),
        ("a.qweight", "I32"),
        ("a.SCB", "F32"),
        ("a.weight.absmax", "U8"),
    ],
)
def test_a_quantized_checkpoint_is_known_by_its_tensors(name: str, dtype: str) -> None:
    with pytest.raises(
        ModelError, match=rf"is quantized already \(it holds {name} as {dtype}\); give the original"
    ):
        check_plain(checkpoint({**PLAIN, name: dtype}))


def test_plain_checkpoints_pass() -> None:
    check_plain(checkpoint(PLAIN))
    check_plain(checkpoint(PLAIN, {"quantization_config": None}))


# ---- planning without torch

PLAN = """
import sys
import fleetpress.jobs.driver.run
from fleetpress.jobs.planning.fleet import Model
from fleetpress.jobs.planning.plan import plan_checkpoint
from fleetpress.jobs.spec.recipe import Recipe
from fleetpress.storage.checkpoint import open_checkpoint
from fleetpress.storage.sources import find_models
(source,) = find_models("llm")
for step in ({"scheme": "W4A16"}, {"scheme": "FP8"}, {"scheme": "BF16"}):
    recipe = Recipe.model_validate({"prune": {"method": "magnitude_n_m", "pattern": "2:4"}, "quantize": step})
    model = Model(name="llm", source=source, recipe=recipe, data=None)
    plan = plan_checkpoint(
        model, open_checkpoint("llm"), output="out", run="r", seed=0, memory_bytes=1 << 30
    )
    print(*(task.kind for task in plan.tasks))
print("torch" in sys.modules)
"""


def test_plans_are_made_without_torch(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    header, _, size = header_of_file(
        [("model.q_proj.weight", "BF16", (64, 128)), ("lm_head.weight", "BF16", (96, 128))]
    )
    (tmp_path / "llm" / "model.safetensors").write_bytes(header + bytes(size - len(header)))
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = subprocess.run(
        [sys.executable, "-c", PLAN], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [*["convert assemble"] * 3, "False"], done.stderr
