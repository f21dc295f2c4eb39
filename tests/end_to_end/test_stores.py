"""Folder, moto, SeaweedFS, mixed, inline or on Ray, data in any format: the same digests and the same bytes."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fleetpress.jobs import run_fleet
from fleetpress.jobs.checkpoint import layout as checkpoint_layout
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.planning import plan_builder
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

SPEC = """\
version: 1
name: stores
output: {output}
models:
  - {{source: "{source}/net.pt2", data: points, recipe: small}}
  - {{source: "{source}/language/", recipe: packed}}
data:
  points: {{train: "{source}/train-*.npz", eval: "{source}/eval.npz", loss: cross_entropy}}
recipes:
  small:
    collect: {{batch_size: 16}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    quantize: {{scheme: W4A16, group_size: 8}}
    validate: {{max_drop: 1.0}}
  packed: {{quantize: {{scheme: W4A16_ASYM, group_size: 8}}}}
"""


def points(rows: int, seed: int) -> dict[str, Tensor]:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return {"inputs": x, "targets": (x[:, :3]).argmax(1)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Everything that the spec names, by key."""
    shards = {f"train-{index}.npz": npz_bytes(points(32, index)) for index in range(3)}
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{index}.proj.weight": torch.randn(12, 20, generator=generator) for index in range(4)}
    return {
        **shards,
        "eval.npz": npz_bytes(points(32, 9)),
        "net.pt2": save_program(module_to_program(net(), [torch.zeros(2, 6)]), compress=False),
        "language/config.json": b'{"model_type": "llama", "tie_word_embeddings": false}',
        "language/model.safetensors": save(weights),
        "language/tokenizer.json": b"{}",
    }


def run(files: Mapping[str, bytes], source: str, output: str, executor: str = "inline") -> FleetResult:
    store = open_store(source)
    for key, data in files.items():
        store.put(key, data)
    spec = parse_spec(SPEC.format(source=source, output=output), "spec.yaml")
    result = run_fleet(spec, executor=executor)  # type: ignore[arg-type]
    assert {model.name: (model.state, model.reason) for model in result.models} == {
        "net": ("published", None),
        "language": ("published", None),
    }
    return result


def published(result: FleetResult) -> dict[str, bytes]:
    """Every file of the artifacts but those that name places or hold measured times; keys hold the digests."""
    store = open_store(f"{result.output}/models")
    named = ("manifest.json", "latest.json", "metrics.json")
    return {info.key: store.get(info.key) for info in store.list() if not info.key.endswith(named)}


@pytest.fixture(scope="module")
def in_folder(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("folder")
    found = published(run(files, str(place / "in"), str(place / "out")))
    assert {key.split("/")[0] for key in found} == {"net", "language"}
    return found


@pytest.mark.parametrize("server", ["s3_uri", "seaweed_uri"])
def test_s3_gives_the_bytes_of_a_folder(
    server: str, request: pytest.FixtureRequest, files: dict[str, bytes], in_folder: dict[str, bytes]
) -> None:
    place = request.getfixturevalue(server)
    assert published(run(files, f"{place}/in", f"{place}/out")) == in_folder


def test_from_s3_to_a_folder(
    s3_uri: str, tmp_path: Path, files: dict[str, bytes], in_folder: dict[str, bytes]
) -> None:
    assert published(run(files, f"{s3_uri}/in", str(tmp_path))) == in_folder


def test_from_a_folder_to_s3_on_ray(
    ray_cluster: None, s3_uri: str, tmp_path: Path, files: dict[str, bytes], in_folder: dict[str, bytes]
) -> None:
    assert published(run(files, str(tmp_path), f"{s3_uri}/out", "ray")) == in_folder


@pytest.fixture
def many_tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_builder, "CHUNK_BYTES", 1)
        patch.setattr(plan_builder, "GROUP_BYTES", 3000)
        patch.setattr(checkpoint_layout, "TASK_BYTES", 2000)
        patch.setattr(checkpoint_layout, "PART_BYTES", 200)
        patch.setattr(checkpoint_layout, "_SMALL_BYTES", 100)
        yield


def test_many_small_tasks_decide_and_quantize_the_same(
    many_tasks: None, tmp_path: Path, files: dict[str, bytes], in_folder: dict[str, bytes]
) -> None:
    result = run(files, str(tmp_path / "in"), str(tmp_path / "out"))
    records = open_store(f"{result.output}/records")
    done = [json.loads(records.get(info.key)) for info in records.list() if info.key.endswith(".json")]
    kinds = Counter(record["kind"] for record in done)
    assert kinds["collect"] == 3
    assert kinds["quantize"] == 4
    assert kinds["convert"] == 2
    found = {key: data for key, data in published(result).items() if key.startswith("net/")}
    assert found == {key: data for key, data in in_folder.items() if key.startswith("net/")}


def parquet_bytes(arrays: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(value.tolist()) for name, value in arrays.items()}), buffer)
    return buffer.getvalue()


def test_data_of_every_format_gives_the_same_model(
    tmp_path: Path, files: dict[str, bytes], in_folder: dict[str, bytes]
) -> None:
    formats = {"safetensors": save, "parquet": parquet_bytes}
    models = {key.split("/")[2]: data for key, data in in_folder.items() if key.startswith("net/")}
    for suffix, write in formats.items():
        store = open_store(str(tmp_path / suffix))
        store.put("net.pt2", files["net.pt2"])
        for index in range(3):
            store.put(f"train-{index}.{suffix}", write(points(32, index)))
        store.put(f"eval.{suffix}", write(points(32, 9)))
        text = SPEC.replace(".npz", f".{suffix}").replace(
            '  - {{source: "{source}/language/", recipe: packed}}\n', ""
        )
        text = text.replace("  packed: {{quantize: {{scheme: W4A16_ASYM, group_size: 8}}}}\n", "")
        spec = parse_spec(
            text.format(source=tmp_path / suffix, output=tmp_path / suffix / "out"), "spec.yaml"
        )
        (model,) = run_fleet(spec, executor="inline").models
        assert (model.state, model.reason) == ("published", None)
        data = open_store(str(tmp_path / suffix / "out")).get(f"models/net/{model.digest}/model.pt2")
        assert data == models["model.pt2"]
        assert np.isfinite(model.after["value"])  # type: ignore[index]
