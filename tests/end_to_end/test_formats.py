"""Every form that a program's weights can be stored in, through spec, plan, run, proof and back to floats."""

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fleetpress.compression.smoke import smoke_inputs
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.artifacts import dequantize, verify
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.programs import load_program, save_program
from fleetpress.storage.store import open_store

# What is stored for a weight besides `_packed`, and how close outputs stay at least (cosine).
FORMS = {
    "k-means": ("{num_bits: 2, method: weighted_k_means, group_size: 16}", {"_codebook", "_scale"}, 0.85),
    "mxfp4": ("{scheme: mxfp4, method: smallest_error}", {"_codebook", "_scale"}, 0.97),
    "ternary": ("{scheme: TERNARY}", {"_scale"}, 0.8),
    "fp8": ("{scheme: FP8}", {"_scale"}, 0.99),
    "w8a8": ("{scheme: W8A8, method: smallest_error}", {"_scale"}, 0.99),
}
SPEC = """\
version: 1
name: forms
output: {place}/output
data: {{d: {{train: "{place}/data/train.npz", eval: "{place}/data/test.npz", metric: cosine}}}}
models:
{models}
recipes:
{recipes}
"""


class Net(nn.Module):
    """A layer that gains from an integer kernel, and a small one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(192, 256), nn.Linear(256, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)).mean(1))


def batch(count: int, seed: int) -> Tensor:
    return torch.randn(count, 64, 192, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, FleetResult, dict[str, int | None]]:
    place = tmp_path_factory.mktemp("forms")
    store = open_store(str(place))
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (batch(4, 0),), dynamic_shapes=({0: Dim.DYNAMIC},))
    store.put("model.pt2", save_program(program))
    store.put("data/train.npz", npz_bytes({"inputs": batch(12, 1)}))
    store.put("data/test.npz", npz_bytes({"inputs": batch(12, 2)}))
    models = "\n".join(
        f'  - {{name: {name}, source: "{place}/model.pt2", data: d, recipe: {name}}}' for name in FORMS
    )
    recipes = "\n".join(
        f"  {name}: {{quantize: {step}, validate: {{max_drop: {1 - least:.2f}}}}}"
        for name, (step, _, least) in FORMS.items()
    )
    spec = parse_spec(SPEC.format(place=place, models=models, recipes=recipes), "spec.yaml")
    plan = preview(spec)
    assert not plan.problems
    planned = {model.name: model.quantized_bytes for model in plan.models}
    return spec, run_fleet(spec, executor="inline"), planned


def test_all_are_published_as_planned(
    fleet: tuple[Spec, FleetResult, dict[str, int | None]], tmp_path: Path
) -> None:
    _, result, planned = fleet
    assert {model.name: (model.state, model.reason) for model in result.models} == dict.fromkeys(
        FORMS, ("published", None)
    )
    store = open_store(result.output)
    for model in result.models:
        folder = f"models/{model.name}/{model.digest}"
        metrics = json.loads(store.get(f"{folder}/metrics.json"))
        layers = {layer["name"]: layer for layer in metrics["layers"]}
        assert planned[model.name] == sum(
            layer["bytes_after"] for layer in layers.values() if layer["num_bits"]
        )
        plain = torch.export.load(io.BytesIO(store.get(f"{folder}/model.pt2")))
        suffixes = {f"_{name.rpartition('_')[2]}" for name in plain.state_dict if "weight_" in name}
        if model.name == "w8a8":
            assert suffixes == {"_packed", "_scale", "_int8", "_offset"}
            assert layers["body"]["activation_bits"] == 8
            assert "activation_bits" not in layers["head"]
            assert layers["head"]["skipped"] == "reads floats: it is too small to gain from an integer kernel"
        else:
            assert suffixes == {"_packed"} | FORMS[model.name][1]
            assert not any("activation_bits" in layer for layer in layers.values())
        bits = 8 * (sum(layer["bytes_after"] for layer in layers.values()) + 4 * 262)
        assert metrics["bits_per_weight"] == pytest.approx(bits / (192 * 256 + 256 * 6 + 262), abs=1e-3)
        assert model.after is not None
        assert model.after["parameters"] == 192 * 256 + 256 * 6 + 262
        assert model.before is not None
        assert model.after["macs"] == model.before["macs"]

        # What a user loads runs as what was published; back to floats only inputs are not rounded any more.
        uri = f"{result.output}/{folder}"
        assert verify(uri) == []
        inputs = smoke_inputs(load_program(store.get(f"{folder}/model.pt2")))["x"]
        loaded = load_artifact(uri)
        assert callable(loaded)
        assert torch.equal(loaded(inputs), plain.module()(inputs))
        dequantize(uri, str(tmp_path / model.name))
        floats = load_program((tmp_path / model.name / "model.pt2").read_bytes())
        assert set(floats.state_dict) == {"body.weight", "body.bias", "head.weight", "head.bias"}
        with torch.no_grad():
            one, other = floats.module()(inputs), plain.module()(inputs)
        assert torch.allclose(one, other, atol=0.02 if model.name == "w8a8" else 1e-6)


def test_again_nothing_is_done(fleet: tuple[Spec, FleetResult, dict[str, int | None]]) -> None:
    spec, _, _ = fleet
    assert {model.state for model in run_fleet(spec, executor="inline").models} == {"unchanged"}


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{scheme: NF4}", "quantizes by NF4, which only programs hold"),
        ("{num_bits: 4, method: k_means}", "quantizes by k_means, which only programs hold"),
    ],
)
def test_checkpoints_say_that_they_cannot(step: str, words: str, tmp_path: Path) -> None:
    from safetensors.torch import save

    open_store(str(tmp_path)).put("model.safetensors", save({"fc.weight": torch.randn(8, 8)}))
    text = (
        f"version: 1\nname: c\noutput: {tmp_path}/output\n"
        f'models: [{{source: "{tmp_path}/model.safetensors", recipe: r}}]\nrecipes: {{r: {{quantize: {step}}}}}\n'
    )
    (problem,) = preview(parse_spec(text, "spec.yaml")).problems
    assert words in problem["reason"]
