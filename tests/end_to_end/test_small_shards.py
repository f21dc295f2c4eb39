"""Shards of train data with few samples or none: a last file may be small, and all of it in the fold left out."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fleetpress.jobs import run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

SPEC = """\
version: 1
name: shards
output: {place}/output
models:
  - {{name: net, source: "{place}/net.pt2", data: rows, recipe: {recipe}}}
data:
  rows: {{train: "{place}/data/train-*.npz", eval: "{place}/data/test.npz", metric: agreement}}
recipes:
  pruned:
    prune: {{method: fisher, sparsity: 0.25, compensate: least_squares}}
    quantize: {{scheme: W4A16_ASYM, group_size: 8, method: gptq}}
    calibrate: {{samples: 8}}
    validate: {{max_drop: 0.9}}
  searched:
    auto: {{max_drop: 10%, trials: 4}}
"""


class BatchOf4(nn.Module):
    """It cannot do with any other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x.reshape(16).reshape(4, 4))))  # type: ignore[no-any-return]


def run(place: Path, module: nn.Module, recipe: str, shards: tuple[int, ...]) -> FleetResult:
    """The recipe on shards of so many samples, which together are always the same."""
    torch.manual_seed(0)
    store = open_store(str(place))
    for value in module.parameters():
        nn.init.normal_(value)
    store.put("net.pt2", save_program(module_to_program(module.eval(), [torch.randn(4, 4)]), compress=False))
    rows = torch.randn(sum(shards), 4)
    for number, part in enumerate(rows.split(list(shards))):
        store.put(f"data/train-{number}.npz", npz_bytes({"inputs": part}))
    store.put("data/test.npz", npz_bytes({"inputs": torch.randn(64, 4)}))
    return run_fleet(parse_spec(SPEC.format(place=place, recipe=recipe), "spec.yaml"), executor="inline")


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("shards", [(0, 64), (64, 0), (0, 0, 40, 24), (1, 62, 1)])
def test_shards_without_samples_tell_nothing(tmp_path: Path, shards: tuple[int, ...]) -> None:
    (model,) = run(tmp_path, perceptron(), "pruned", shards).models
    assert model.state == "published", model.reason


def test_of_a_fixed_batch_small_shards_are_left_out_and_many_shards_give_a_batch_each(tmp_path: Path) -> None:
    (model,) = run(tmp_path, BatchOf4(), "pruned", (16, 3, 16, 9)).models
    assert model.state == "published", model.reason


@pytest.mark.parametrize("shards", [(0, 120, 120, 1), (1,) * 60], ids=["a_last_one", "all_of_them"])
def test_a_search_on_shards_of_one_sample_refuses_no_candidate_for_it(
    tmp_path: Path, shards: tuple[int, ...]
) -> None:
    result = run(tmp_path, perceptron(), "searched", shards)
    (model,) = result.models
    assert model.state == "published", model.reason
    metrics = json.loads(open_store(result.output).get(f"models/net/{model.digest}/metrics.json"))
    assert "search" in metrics
    assert metrics["warnings"] == []
