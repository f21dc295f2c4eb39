"""A codebook that finetune has trained is the one that is published, and better than one that it has not."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from fleetpress.compression.program import with_tensors
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import load_program, module_to_program, save_program
from fleetpress.storage.store import open_store

Sets = tuple[dict[str, Tensor], dict[str, Tensor]]
NAMES = ("1.weight", "3.weight")
SPEC = """\
version: 1
name: shared
output: {place}/output
models:
  - {{name: trained, source: "{place}/net.pt2", data: digits, recipe: trained}}
  - {{name: apart, source: "{place}/net.pt2", data: digits, recipe: apart}}
  - {{name: zeros, source: "{place}/net.pt2", data: digits, recipe: zeros}}
data:
  digits: {{train: "{place}/train.npz", eval: "{place}/test.npz", loss: cross_entropy, metric: accuracy}}
recipes:
  trained: &steps
    train: {{epochs: 4, batch_size: 64, lr: 5.0e-3}}
    finetune: {{epochs: 3, batch_size: 64, lr: 3.0e-3, quantization_aware: true}}
    quantize: {{num_bits: 1, method: k_means}}
    validate: {{max_drop: 1.0}}
  apart:
    <<: *steps
    finetune: {{epochs: 3, batch_size: 64, lr: 3.0e-3}}
  zeros:
    <<: *steps
    prune: {{method: magnitude_unstructured, sparsity: 0.7, schedule: gradual, interval: 4, ignore: ["3"]}}
    quantize: {{num_bits: 2, method: weighted_k_means}}
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, digits: Sets) -> FleetResult:
    """A net whose weights share two values, trained as such and not, and one with zeros among four."""
    place = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    store = open_store(str(place))
    store.put("net.pt2", save_program(module_to_program(net, [digits[0]["inputs"][:2]]), compress=False))
    store.put("train.npz", npz_bytes(digits[0]))
    store.put("test.npz", npz_bytes(digits[1]))
    found = run_fleet(parse_spec(SPEC.format(place=place), "spec.yaml"), executor="inline")
    assert {model.state for model in found.models} == {"published"}, [model.reason for model in found.models]
    return found


def stored(result: FleetResult, task: str) -> dict[str, Tensor]:
    """The tensors that a task has stored."""
    store = open_store(result.output)
    records = [
        json.loads(store.get(item.key)) for item in store.list("records/") if item.key.endswith(".json")
    ]
    (output,) = next(record["outputs"] for record in records if record["task"] == task)
    return load(store.get(output["key"]))


@pytest.mark.parametrize("name", ["trained", "zeros"])
def test_what_is_published_computes_what_was_trained(result: FleetResult, digits: Sets, name: str) -> None:
    digest = next(model.digest for model in result.models if model.name == name)
    seen, images = stored(result, f"{name}/finetune"), digits[1]["inputs"]
    source = load_program(open_store(str(Path(result.output).parent)).get("net.pt2"))
    trained = with_tensors(source, {key: value for key, value in seen.items() if "/" not in key}).module()
    published = open_store(result.output).get(f"models/{name}/{digest}/model.pt2")
    folded = load_artifact(f"{result.output}/models/{name}/{digest}")
    assert isinstance(folded, nn.Module)
    with torch.no_grad():
        outputs = trained(images)
        assert torch.equal(torch.export.load(io.BytesIO(published)).module()(images), outputs)
        assert torch.equal(folded(images), outputs)
    state, codes = folded.state_dict(), stored(result, f"{name}/quantize")
    for weight in NAMES:
        assert torch.equal(state[weight], seen[weight])
        assert set(state[weight].unique().tolist()) <= set(seen[f"codebook_entries/{weight}"].tolist())
        assert torch.equal(codes[f"{weight}/codebook"], seen[f"codebook_entries/{weight}"])
    if name == "zeros":
        assert int((state["1.weight"] == 0).sum()) >= int(0.7 * 64 * 48)


def test_trained_entries_lose_less(result: FleetResult) -> None:
    values = {model.name: (model.after or {})["value"] for model in result.models}
    assert values["trained"] > values["apart"] + 0.05
    assert values["zeros"] > 0.8
