"""Zeros that grow and codes that are trained during finetune: what is published is what the fine-tuning saw."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

SPEC = """\
version: 1
name: tuned
output: {place}/output
models:
  - {{name: net, source: "{place}/net.pt2", data: digits, recipe: aware}}
  - {{name: apart, source: "{place}/net.pt2", data: digits, recipe: apart}}
  - {{name: begun, source: "{place}/net.pt2", data: digits, recipe: begun}}
data:
  digits: {{train: "{place}/train.npz", eval: "{place}/test.npz", loss: cross_entropy, metric: accuracy}}
recipes:
  aware: &steps
    train: {{epochs: 6, batch_size: 64, lr: 5.0e-3, schedule: one_cycle}}
    prune: {{method: magnitude_unstructured, sparsity: 0.8, scope: global, schedule: gradual, interval: 4}}
    finetune: {{epochs: 10, batch_size: 64, lr: 5.0e-3, schedule: cosine, distill: 0.5, quantization_aware: true}}
    quantize: {{num_bits: 2, strategy: tensor, method: smallest_error}}
    validate: {{max_drop: 1.0}}
  apart:
    <<: *steps
    finetune: {{epochs: 10, batch_size: 64, lr: 5.0e-3, schedule: cosine, distill: 0.5}}
  begun:
    train: {{epochs: 6, batch_size: 64, lr: 5.0e-3, schedule: one_cycle}}
    calibrate: {{samples: 256}}
    finetune: {{epochs: 1, batch_size: 64, lr: 1.0e-9, quantization_aware: true}}
    quantize: {{num_bits: 3, strategy: channel, method: gptq}}
    validate: {{max_drop: 1.0}}
"""


def run(place: Path, digits: tuple[dict[str, Tensor], dict[str, Tensor]]) -> FleetResult:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    store = open_store(str(place))
    store.put("net.pt2", save_program(module_to_program(net, [digits[0]["inputs"][:2]]), compress=False))
    store.put("train.npz", npz_bytes(digits[0]))
    store.put("test.npz", npz_bytes(digits[1]))
    return run_fleet(parse_spec(SPEC.format(place=place), "spec.yaml"), executor="inline")


@pytest.fixture(scope="module")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, digits: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> FleetResult:
    return run(tmp_path_factory.mktemp("tuned"), digits)


def stored(result: FleetResult, task: str) -> dict[str, Tensor]:
    """The tensors that a task has stored."""
    store = open_store(result.output)
    records = [
        json.loads(store.get(item.key)) for item in store.list("records/") if item.key.endswith(".json")
    ]
    (output,) = next(record["outputs"] for record in records if record["task"] == task)
    return load(store.get(output["key"]))


def test_the_artifact_holds_the_zeros_and_the_codes_of_the_fine_tuning(tuned: FleetResult) -> None:
    assert {model.state for model in tuned.models} == {"published"}
    left = load_artifact(f"{tuned.output}/models/net").state_dict()
    seen = stored(tuned, "net/finetune")
    for name in ("1.weight", "3.weight"):
        assert torch.equal(left[name], seen[name]), "quantize found other codes than finetune saw"
        assert len(left[name].unique()) <= 4
    zeros = sum(int((left[name] == 0).sum()) for name in ("1.weight", "3.weight"))
    assert zeros >= int(0.8 * (64 * 32 + 32 * 10))
    codes = stored(tuned, "net/quantize")
    assert torch.equal(codes["1.weight/scale"], seen["scales/1.weight"])


def test_training_starts_from_the_codes_of_a_calibrated_method(tuned: FleetResult) -> None:
    left = load_artifact(f"{tuned.output}/models/begun").state_dict()
    seen, trained = stored(tuned, "begun/finetune"), stored(tuned, "net/train")
    for name in ("1.weight", "3.weight"):
        assert torch.equal(left[name], seen[name])
        nearest = (trained[name] / seen[f"scales/{name}"]).round().clamp(-4, 3)
        moved = (left[name] / seen[f"scales/{name}"]).round() != nearest
        assert moved.any(), "GPTQ rounds some weights to the code that is not the nearest"


def test_codes_that_were_trained_lose_less_than_codes_that_were_not(tuned: FleetResult) -> None:
    values = {model.name: (model.after or {})["value"] for model in tuned.models}
    before = {model.name: (model.before or {})["value"] for model in tuned.models}
    assert before["net"] == before["apart"]
    assert values["net"] > before["net"] - 0.05
    assert values["net"] > values["apart"] + 0.02


def test_again_gives_the_same_bytes(
    tuned: FleetResult, tmp_path: Path, digits: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    again = run(tmp_path, digits)
    assert {model.state for model in again.models} == {"published"}, [model.reason for model in again.models]
    assert [model.digest for model in again.models] == [model.digest for model in tuned.models]
    model = next(model for model in tuned.models if model.name == "net")
    names = [f"models/net/{model.digest}/{file}" for file in ("model.pt2", "recipe.yaml")]
    one, two = open_store(tuned.output), open_store(again.output)
    assert [one.get(name) for name in names] == [two.get(name) for name in names]
