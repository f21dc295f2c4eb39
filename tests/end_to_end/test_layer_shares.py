"""Units deleted and weights zeroed, layer by layer, in one recipe: what is published has both."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.programs import module_to_program, save_program

SPEC = """\
version: 1
name: shares
output: {place}/output
models: [{{name: net, source: "{place}/net.pt2", data: digits, recipe: both}}]
data:
  digits: {{train: "{place}/train.npz", eval: "{place}/test.npz", loss: cross_entropy, metric: accuracy}}
recipes:
  both:
    prune: {{method: magnitude, layers: {{"1": {{sparsity: 0.5}}}}, zeros: {{interval: 4, layers: {zeros}}}}}
    finetune: {{epochs: 2, batch_size: 64, lr: 5.0e-3, distill: 0.5, quantization_aware: true}}
    quantize: {{num_bits: 3, strategy: tensor, layers: {{"3": {{num_bits: 4}}}}}}
    validate: {{max_drop: 1.0}}
"""


def _spec(place: Path, zeros: str, digits: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Spec:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    program = module_to_program(net, [digits[0]["inputs"][:2]])
    (place / "net.pt2").write_bytes(save_program(program, compress=False))
    (place / "train.npz").write_bytes(npz_bytes(digits[0]))
    (place / "test.npz").write_bytes(npz_bytes(digits[1]))
    return parse_spec(SPEC.format(place=place, zeros=zeros), "spec.yaml")


@pytest.fixture
def digits_few(
    digits: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A few hundred samples: what is looked at is not how good the net is."""
    known, held_out = ({name: value[:320] for name, value in part.items()} for part in digits)
    return known, held_out


def test_what_is_published_has_fewer_units_and_zeros_in_what_is_left(
    tmp_path: Path, digits_few: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    spec = _spec(tmp_path, '{"1": {sparsity: 0.75}}', digits_few)
    (planned,) = preview(spec).models
    assert [layer["prune"] for layer in planned.layers or ()] == ["16 of 32 units", None]
    assert "zeros grow in what is left" in planned.warnings[0]
    (model,) = run_fleet(spec, executor="inline").models
    assert (model.state, model.reason) == ("published", None)
    left = load_artifact(f"{tmp_path}/output/models/net").state_dict()
    assert {name: tuple(left[name].shape) for name in ("1.weight", "3.weight")} == {
        "1.weight": (16, 64),
        "3.weight": (10, 16),
    }
    zeros = {name: float((left[name] == 0).double().mean()) for name in ("1.weight", "3.weight")}
    assert zeros["1.weight"] >= 0.75
    assert zeros["3.weight"] < 0.75
    assert len(left["1.weight"].unique()) <= 8
    metrics = json.loads((tmp_path / f"output/models/net/{model.digest}/metrics.json").read_text())
    first, last = metrics["layers"]
    assert (first["sparsity"], len(first["removed_units"]), first["num_bits"]) == (0.5, 16, 3)
    assert first["zeros"] == pytest.approx(zeros["1.weight"], abs=1e-6)
    assert last["num_bits"] == 4


def test_a_name_that_is_no_layer_fails_the_model_with_the_nearest(
    tmp_path: Path, digits_few: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    (model,) = run_fleet(_spec(tmp_path, "{fc: {sparsity: 0.75}}", digits_few), executor="inline").models
    assert model.state == "failed"
    assert "'fc', which is no layer here; the layers are 1, 3" in str(model.reason)
