"""Data-parallel training: two workers on Ray give what one gives, and everything after training does not notice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from fleetpress.jobs import run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import (
    EVENTS,
    RUNS,
    FleetResult,
)
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

pytestmark = pytest.mark.long

SPEC = """\
version: 1
name: workers
output: {output}
models:
  - {{source: "{source}/net.pt2", data: images, recipe: small}}
data:
  images: {{train: "{source}/train.npz", eval: "{source}/eval.npz"}}
recipes:
  small:
    train: {{epochs: 4, batch_size: 30, lr: 1.0e-2}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    quantize: {{scheme: W8A16}}
    validate: {{max_drop: 0.2}}
resources: {{workers: {workers}}}
"""


def net() -> nn.Module:
    """Convolutions with batch normalization below a perceptron.

    No bias in front of a normalization: it has no gradient, and Adam would make steps of the rounding noise.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 3),
    )


def images(rows: int, seed: int) -> dict[str, Tensor]:
    x = torch.randn(rows, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return {"inputs": x, "targets": x.reshape(rows, 3, 12).mean(2).argmax(1)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("workers")
    store = open_store(str(place))
    store.put("train.npz", npz_bytes(images(217, 0)))  # the last batch has seven samples, an odd number
    store.put("eval.npz", npz_bytes(images(90, 1)))
    program = module_to_program(net(), [torch.zeros(2, 1, 6, 6)])
    store.put("net.pt2", save_program(program, compress=False))
    return place


def run(source: Path, output: Path, workers: int, executor: str) -> FleetResult:
    text = SPEC.format(source=source, output=output, workers=workers)
    result = run_fleet(parse_spec(text, "spec.yaml"), executor=executor)  # type: ignore[arg-type]
    assert [(model.state, model.reason) for model in result.models] == [("published", None)]
    return result


@pytest.fixture(scope="module")
def one_worker(source: Path, tmp_path_factory: pytest.TempPathFactory) -> FleetResult:
    return run(source, tmp_path_factory.mktemp("one"), 1, "inline")


@pytest.fixture(scope="module")
def two_workers(source: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> FleetResult:
    return run(source, tmp_path_factory.mktemp("two"), 2, "ray")


def trained(result: FleetResult) -> tuple[dict[str, Tensor], list[float]]:
    """Tensors and losses that the training recorded."""
    store = open_store(f"{result.output}/records")
    for info in store.list():
        if not info.key.endswith(".json"):
            continue
        record = json.loads(store.get(info.key))
        if record["kind"] == "train":
            return load(store.get(info.key.replace(".json", ".safetensors"))), record["result"]["losses"]
    raise AssertionError("no training is recorded")


def removed_units(result: FleetResult) -> dict[str, list[int]]:
    (model,) = result.models
    metrics = json.loads(open_store(result.output).get(f"models/net/{model.digest}/metrics.json"))
    return {layer["name"]: layer["removed_units"] for layer in metrics["layers"]}


def accuracy(result: FleetResult) -> float:
    (model,) = result.models
    assert model.after is not None
    return float(model.after["value"])


def test_two_workers_train_and_decide_like_one(one_worker: FleetResult, two_workers: FleetResult) -> None:
    alone, losses = trained(one_worker)
    together, losses_together = trained(two_workers)
    assert losses_together == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]
    assert alone.keys() == together.keys()
    assert any(key.startswith("statistics/") for key in alone)
    for key, value in alone.items():
        scale = float(value.double().abs().max())
        assert torch.allclose(value, together[key], rtol=1e-3, atol=1e-4 * max(scale, 1e-3)), key
    assert any(removed_units(one_worker).values())
    assert removed_units(one_worker) == removed_units(two_workers)
    assert accuracy(one_worker) > 0.6
    assert accuracy(two_workers) == pytest.approx(accuracy(one_worker), abs=0.03)


def test_what_all_ranks_move_is_counted(source: Path, two_workers: FleetResult) -> None:
    store = open_store(two_workers.output)
    events = [json.loads(line) for line in store.get(f"{RUNS}{two_workers.run}/{EVENTS}").splitlines()]
    [ended] = [event for event in events if event["kind"] == "finished" and event["step"] == "train"]
    read_by_each = sum((source / name).stat().st_size for name in ("net.pt2", "train.npz"))
    assert ended["bytes_read"] == 2 * read_by_each
    assert ended["bytes_written"] in store.sizes("records/").values()  # rank 0 stores the weights
    assert "/" in ended["where"]


def test_number_of_training_workers_is_part_of_the_digest(
    one_worker: FleetResult, two_workers: FleetResult
) -> None:
    assert one_worker.models[0].digest != two_workers.models[0].digest


def test_inline_trains_in_one_process_whatever_the_spec_allows(
    source: Path, one_worker: FleetResult, tmp_path: Path
) -> None:
    result = run(source, tmp_path, 2, "inline")
    alone, values = trained(one_worker)[0], trained(result)[0]
    assert all(torch.equal(value, values[key]) for key, value in alone.items())
