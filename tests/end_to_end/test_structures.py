"""Heads, a residual stream and hidden units down the whole road: trained, deleted, tuned, quantized, published, run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

TRAIN, EVAL = 128, 64


class Transformer(nn.Module):
    """torch's own layer; its residual stream begins behind a layer, so that it can be made narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(4, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head, self.pooler = nn.Linear(16, 3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.embed(x)).mean(1)
        torch.tanh(self.pooler(x))  # nothing reads it, as in many an encoder
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 12, batch_first=True)
        self.gru, self.head = nn.GRU(12, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "transformer": (
        Transformer,
        {
            "embed": 8,
            "layer.self_attn.in_proj_weight": 24,
            "layer.self_attn.out_proj": 8,
            "layer.linear2": 8,
        },
    ),
    "recurrent": (Recurrent, {"lstm": 6, "gru": 6}),
}
SPEC = """\
version: 1
name: structures
output: {place}/output
models:
  - {{source: "{place}/models/*.pt2", data: signs, recipe: all}}
data:
  signs: {{train: "{place}/data/train.npz", eval: "{place}/data/eval.npz"}}
recipes:
  all:
    train: {{epochs: 14, batch_size: 32, lr: 1.0e-2}}
    prune: {{sparsity: 0.5, structure: [head, recurrent, normalized]}}
    finetune: {{epochs: 4, batch_size: 32, lr: 5.0e-3}}
    quantize: {{num_bits: 6, symmetric: false, group_size: 8}}
    validate: {{max_drop: "20%"}}
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> FleetResult:
    place = tmp_path_factory.mktemp("structures")
    store = open_store(str(place))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TRAIN + EVAL, 3, 4, generator=generator)
    labels = (x.mean(1) @ torch.randn(4, 3, generator=generator)).argmax(1)
    for name, rows in {"train": slice(TRAIN), "eval": slice(TRAIN, None)}.items():
        store.put(f"data/{name}.npz", npz_bytes({"inputs": x[rows], "targets": labels[rows]}))
    for name, (build, _) in NETS.items():
        torch.manual_seed(0)
        store.put(f"models/{name}.pt2", save_program(module_to_program(build(), [x[:2]]), compress=False))
    return run_fleet(parse_spec(SPEC.format(place=place), "structures.yaml"), executor="inline")


@pytest.mark.parametrize("name", NETS)
def test_published_smaller_and_good(name: str, fleet: FleetResult) -> None:
    model = next(model for model in fleet.models if model.name == name)
    assert (model.state, model.reason) == ("published", None)
    assert model.before is not None
    assert model.after is not None
    assert model.after["value"] >= 0.7
    assert model.after["macs"] < model.before["macs"]
    place = f"models/{name}/{model.digest}"
    metrics: dict[str, Any] = json.loads(open_store(fleet.output).get(f"{place}/metrics.json"))
    lost = {layer["name"]: len(layer["removed_units"]) for layer in metrics["layers"]}
    assert {layer: count for layer, count in lost.items() if count} == NETS[name][1]
    assert all(layer["sparsity"] == 0.5 for layer in metrics["layers"] if layer["removed_units"])
    unread = {layer["name"]: layer for layer in metrics["layers"] if layer["bytes_after"] == 0}
    assert set(unread) == ({"pooler"} if name == "transformer" else set())
    assert all("nothing reads its outputs" in layer["skipped"] for layer in unread.values())
    module = load_artifact(str(Path(fleet.output) / place))
    assert module(torch.zeros(5, 3, 4)).shape == (5, 3)
