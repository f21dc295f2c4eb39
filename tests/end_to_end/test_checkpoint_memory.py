"""Memory of a checkpoint's tasks: what is declared is kept, whatever the size of tensor, shard and model."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.spec.fleet_spec import parse_spec

CEILING_BYTES = 400 << 20
HUGE = ("F32", 52_000, 2_048)  # 426 MB
LAYER = ("BF16", 8_192, 2_048)
_ITEM_BYTES = {"F32": 4, "BF16": 2}
SPEC = """\
version: 1
name: memory
output: {place}/output
models: [{{source: "{place}/net.safetensors", recipe: it}}]
recipes: {{it: {{{recipe}}}}}
resources: {{memory_per_task: 400MiB}}
"""
RUN = "import sys; from fleetpress.jobs.cli import main; sys.exit(main(sys.argv[1:]))"


def write_sparse(place: Path, layers: int) -> None:
    """One shard of zeros that takes no room on the disk: a tensor of 426 MB, and matrices of 34 MB."""
    tensors = {"huge.weight": HUGE, **{f"layers.{index}.weight": LAYER for index in range(layers)}}
    entries, end = {}, 0
    for name, (dtype, *shape) in tensors.items():
        start, end = end, end + _ITEM_BYTES[dtype] * shape[0] * shape[1]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (place / "net.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def peak_anonymous_bytes(command: list[str]) -> int:
    """Runs a command to its end; the most anonymous memory that was seen of it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, *found, 0)
        time.sleep(0.003)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return peak


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        ("quantize: {scheme: W4A16}", 8),  # 690 MB
        ('prune: {method: magnitude_n_m, pattern: "2:4"}, quantize: {scheme: W8A16}', 1),  # in torch
    ],
    ids=["compiled", "torch"],
)
def test_a_task_stays_below_its_ceiling(recipe: str, layers: int, tmp_path: Path) -> None:
    write_sparse(tmp_path, layers)
    text = SPEC.format(place=tmp_path, recipe=recipe)
    (tmp_path / "spec.yaml").write_text(text)
    (planned,) = preview(parse_spec(text, "spec.yaml")).models
    assert planned.forecast is not None
    command = [
        sys.executable,
        "-c",
        RUN,
        "run",
        str(tmp_path / "spec.yaml"),
        "--executor",
        "inline",
    ]
    peak = peak_anonymous_bytes(command)
    assert planned.forecast["memory_bytes"] <= CEILING_BYTES
    assert peak <= CEILING_BYTES  # of two tasks side by side, if both fit
    made = sum(file.stat().st_size for file in tmp_path.glob("output/models/net/*/*.safetensors"))
    assert made == planned.forecast["written_bytes"]


def test_a_ceiling_that_cannot_be_kept_is_told_before_anything_is_read(tmp_path: Path) -> None:
    write_sparse(tmp_path, 1)
    recipe = "quantize: {num_bits: 4, strategy: tensor, method: smallest_error}"  # tries ranges on the whole tensor
    found = preview(parse_spec(SPEC.format(place=tmp_path, recipe=recipe), "spec.yaml"))
    (problem,) = found.problems
    assert "huge.weight" in problem["reason"]
    assert "memory_per_task" in problem["reason"]
