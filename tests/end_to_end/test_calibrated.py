"""Recipes that look at what layers read: methods, scales between layers, corrected biases; from spec to artifact."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fleetpress.compression.modes import eval_module
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.recipe import QuantizeStep
from fleetpress.storage.programs import load_program
from fleetpress.storage.store import open_store

STEPS = {
    "plain": "{num_bits: 3, strategy: channel}",
    "gptq": "{num_bits: 3, strategy: channel, method: gptq}",
    "all": "{num_bits: 3, strategy: channel, method: coordinate_descent, equalize: activation_aware, "
    "bias_correction: true}",
    "dataless": "{num_bits: 4, strategy: channel, method: half_quadratic, equalize: cross_layer}",
    "corrected": "{num_bits: 3, strategy: channel, bias_correction: true}",
}
SPEC = (
    """\
version: 1
name: calibrated
output: {place}/output
models:
"""
    + "".join(
        f'  - {{{{name: {name}, source: "{{place}}/models/cnn.pt2", data: digits, recipe: {name}}}}}\n'
        for name in STEPS
    )
    + """\
data:
  digits: {{train: "{place}/data/train-*.npz", eval: "{place}/data/test.npz", loss: cross_entropy, metric: accuracy}}
recipes:
"""
    + "".join(
        f"  {name}:\n    quantize: {{{step}}}\n    validate: {{{{max_drop: 1.0}}}}\n"
        for name, step in STEPS.items()
    )
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, trained_fleet: dict[str, bytes]) -> FleetResult:
    place = tmp_path_factory.mktemp("calibrated")
    for key, data in trained_fleet.items():
        open_store(str(place)).put(key, data)
    return run_fleet(parse_spec(SPEC.format(place=place), "spec.yaml"), executor="inline")


def layer_metrics(result: FleetResult, name: str) -> dict[str, dict[str, Any]]:
    model = next(item for item in result.models if item.name == name)
    assert model.state == "published", model.reason
    stored = json.loads(open_store(result.output).get(f"models/{name}/{model.digest}/metrics.json"))
    return {layer["name"]: layer for layer in stored["layers"]}


def test_three_bits_lose_less_with_data(
    result: FleetResult, trained_fleet: dict[str, bytes], digits: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    inputs = digits[1]["inputs"]
    source = load_program(trained_fleet["models/cnn.pt2"])
    squares, means = {}, {}
    with torch.no_grad():
        expected = eval_module(source)(inputs)
        for name in STEPS:
            module = load_artifact(f"{result.output}/models/{name}")
            assert isinstance(module, torch.nn.Module)
            error = module(inputs) - expected
            squares[name] = float(error.square().mean())
            means[name] = float(error.mean(0).square().mean())
    assert squares["gptq"] < 0.5 * squares["plain"]
    assert squares["all"] < squares["gptq"]
    assert squares["corrected"] < squares["plain"]
    assert means["corrected"] < 0.5 * means["plain"]
    assert squares["dataless"] < squares["plain"]


def test_metrics_tell_methods_and_biases_that_are_missing(result: FleetResult) -> None:
    everything = layer_metrics(result, "all")
    assert {layer["method"] for layer in everything.values()} == {"coordinate_descent"}
    assert everything["conv1"]["skipped"] == "bias_correction: it has no bias"
    assert everything["head"]["skipped"] is None
    assert {layer["method"] for layer in layer_metrics(result, "dataless").values()} == {"half_quadratic"}


def test_what_is_not_asked_for_is_one_recipe() -> None:
    plain = QuantizeStep.model_validate({"scheme": "W4A16"})
    spelled = QuantizeStep.model_validate({"scheme": "W4A16", "equalize": "none", "bias_correction": False})
    assert spelled == plain


class _Gated(nn.Module):
    """Two layers between which a gate, the first input, lets through all or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.layer(inputs[:, 1:]) * inputs[:, :1])
        return outputs


def test_what_counts_by_importance_is_kept(tmp_path: Path) -> None:
    """Behind a closed gate nothing matters, however large it is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 16, generator=generator)
    gate = (torch.arange(600) % 2).float().unsqueeze(1)
    few = torch.randn(4, 16, generator=generator)
    loud = 10 * torch.randn(600, 4, generator=generator) @ few
    inputs = torch.cat([gate, torch.where(gate > 0, x, loud)], 1)
    torch.manual_seed(0)
    net = _Gated().eval()
    program = torch.export.export(net, (inputs[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "gated.pt2")
    for part, some in (("train", inputs[:400]), ("eval", inputs[400:])):
        np.savez(tmp_path / f"{part}.npz", inputs=some.numpy(), targets=net(some).detach().numpy())
    text = f"""\
version: 1
name: important
output: {tmp_path}/output
models:
  - {{name: alike, source: "{tmp_path}/gated.pt2", data: gates, recipe: alike}}
  - {{name: important, source: "{tmp_path}/gated.pt2", data: gates, recipe: important}}
data: {{gates: {{train: "{tmp_path}/train.npz", eval: "{tmp_path}/eval.npz", loss: mse, metric: r2}}}}
recipes:
  alike:
    quantize: {{num_bits: 3, strategy: channel, method: gptq, targets: [layer]}}
    validate: {{max_drop: 1.0}}
  important:
    calibrate: {{importance: gradients}}
    quantize: {{num_bits: 3, strategy: channel, method: gptq, targets: [layer]}}
    validate: {{max_drop: 1.0}}
"""
    found = run_fleet(parse_spec(text, "spec.yaml"), executor="inline").models
    assert [(model.state, model.reason) for model in found] == [("published", None)] * 2
    alike, important = (1 - (model.after or {})["value"] for model in found)
    assert 0 < important < 0.7 * alike


def test_checkpoints_are_told_what_they_cannot_do(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("models/one/model.safetensors", save({"a.weight": torch.ones(4, 4)}))
    store.put("train.npz", b"never read")
    text = f"""\
version: 1
name: fleet
output: {tmp_path}/output
models:
  - {{source: {tmp_path}/models/one, recipe: small, data: texts}}
recipes:
  small:
    calibrate: {{importance: gradients}}
    quantize: {{scheme: W4A16, equalize: cross_layer, biases: FP8}}
data: {{texts: {{train: {tmp_path}/train.npz}}}}
"""
    found = run_fleet(parse_spec(text, "spec.yaml"), executor="inline")
    assert (
        "calibrate with importance: gradients, equalize by cross_layer, round biases, which a bare checkpoint cannot do"
        in str(found.models[0].reason)
    )
