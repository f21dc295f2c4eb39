"""Weights of a program are zeroed, tuned around the zeros, quantized, and stored without them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.sparsity.zero_layers import zero_layers
from fleetpress.compression.statistics import GradientStatistics
from fleetpress.compression.training import TrainOptions, collect, train
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.artifacts import verify
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.planning import plan_builder
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.programs import load_program, module_to_program, save_program
from fleetpress.storage.store import open_store

Sets = tuple[dict[str, Tensor], dict[str, Tensor]]
TUNED = "finetune: {epochs: 1, lr: 2.0e-3, weight_decay: 0.1}"


class Net(nn.Module):
    """A wide hidden layer, a recurrent one, and a transposed convolution, whose inputs are not observed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 640)
        self.narrow = nn.Linear(640, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.turned = nn.ConvTranspose1d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.narrow(torch.relu(self.wide(images.flatten(1)))))
        return self.head(self.turned(self.gru(x.unsqueeze(1))[0].transpose(1, 2))[:, :, -1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits: Sets) -> Path:
    """A trained net and the digits, in two shards."""
    train_set, test_set = digits
    torch.manual_seed(0)
    program = module_to_program(Net(), [train_set["inputs"][:2]])
    trained = train(program, train_set, TrainOptions(epochs=4, lr=3e-3), loss="cross_entropy", seed=0)
    folder = tmp_path_factory.mktemp("sparse")
    store = open_store(str(folder))
    store.put("models/net.pt2", save_program(with_tensors(program, trained.values), compress=False))
    store.put("data/train-0.npz", npz_bytes({name: value[:700] for name, value in train_set.items()}))
    store.put("data/train-1.npz", npz_bytes({name: value[700:] for name, value in train_set.items()}))
    store.put("data/test.npz", npz_bytes(test_set))
    return folder


def spec(place: Path, steps: list[str], spec_text: str) -> Spec:
    lines = "".join(f"    {step}\n" for step in [*steps, "validate: {max_drop: 0.5}"])
    return parse_spec(
        spec_text.partition("recipes:")[0].format(place=place) + f"recipes:\n  small:\n{lines}", "spec.yaml"
    )


def metrics_of(result: FleetResult) -> dict[str, Any]:
    (model,) = result.models
    assert model.state == "published", model.reason
    found = open_store(result.output).get(f"models/net/{model.digest}/metrics.json")
    return dict(json.loads(found))


def stored(result: FleetResult) -> bytes:
    return open_store(result.output).get(f"models/net/{result.models[0].digest}/model.pt2")


def test_zeros_survive_tuning_and_codes_and_are_not_stored(place: Path, spec_text: str, digits: Sets) -> None:
    prune = "prune: {method: magnitude_unstructured, sparsity: 0.8, ignore: head}"
    sparse, dense = (
        spec(place, [*steps, "quantize: {scheme: W4A16}"], spec_text) for steps in ([prune, TUNED], [TUNED])
    )
    result, plain = (run_fleet(item, executor="inline") for item in (sparse, dense))
    metrics, without = metrics_of(result), metrics_of(plain)
    layers = {layer["name"]: layer for layer in metrics["layers"]}
    assert {name: round(layer["sparsity"], 2) for name, layer in layers.items()} == {
        "wide": 0.8,
        "narrow": 0.8,
        "gru": 0.8,
        "turned": 0.8,
        "head": 0.0,
    }
    assert layers["head"]["skipped"] == "prune: not among the targets"
    assert all(layer["removed_units"] == [] and layer["num_bits"] == 4 for layer in layers.values())
    assert metrics["after"]["bytes"] < 0.75 * without["after"]["bytes"]
    assert metrics["bits_per_weight"] < 0.7 * without["bits_per_weight"]
    plain_bytes = {layer["name"]: layer["bytes_after"] for layer in without["layers"]}
    assert layers["wide"]["bytes_after"] < 0.55 * plain_bytes["wide"]
    anybodys = torch.export.load(io.BytesIO(stored(result)))
    assert "wide.weight_mask" in anybodys.state_dict
    folded = load_artifact(f"{result.output}/models/net/{result.models[0].digest}")
    assert isinstance(folded, nn.Module)
    weight = folded.get_parameter("wide.weight")
    assert float((weight == 0).float().mean()) >= 0.8
    assert verify(f"{result.output}/models/net/{result.models[0].digest}") == []
    images = digits[1]["inputs"]
    with torch.no_grad():
        assert torch.equal(anybodys.module()(images), folded(images))
    assert run_fleet(sparse, executor="inline").models[0].state == "unchanged"
    (planned,) = preview(sparse).models
    assert planned.state == "unchanged"


def test_the_plan_tells_tasks_notes_and_the_most_bytes(place: Path, spec_text: str, tmp_path: Path) -> None:
    prune = "prune: {method: magnitude_unstructured, sparsity: 0.5, targets: [wide, narrow]}"
    item = spec(place, [prune, "quantize: {scheme: W8A16}"], spec_text).model_copy(
        update={"output": str(tmp_path)}
    )
    (planned,) = preview(item).models
    notes = {layer["name"]: layer["prune"] for layer in planned.layers}
    assert notes == {"wide": "50% zeroed", "narrow": "50% zeroed", "gru": None, "turned": None, "head": None}
    assert planned.tasks == 3
    metrics = metrics_of(run_fleet(item, executor="inline"))
    spent = {layer["name"]: layer["bytes_after"] for layer in metrics["layers"]}
    assert planned.quantized_bytes is not None
    assert sum(spent.values()) <= planned.quantized_bytes
    weights = 64 * 640
    assert spent["wide"] <= weights // 8 + weights // 2 + 4 * 640
    assert any("the most it can be" in warning for warning in planned.warnings)


@pytest.mark.parametrize("amount", ["sparsity: 0.8", "pattern: 2:4"])
def test_sparsegpt_observes_inputs_before_it_zeroes(place: Path, spec_text: str, amount: str) -> None:
    prune = f"prune: {{method: sparsegpt, {amount}}}"
    item = spec(place, [prune, TUNED, "calibrate: {samples: 200}"], spec_text)
    result = run_fleet(item, executor="inline")
    metrics = metrics_of(result)
    share = 0.5 if "pattern" in amount else 0.8
    assert all(layer["sparsity"] == pytest.approx(share, abs=0.01) for layer in metrics["layers"])
    unseen = "magnitude_n_m" if "pattern" in amount else "magnitude_unstructured"
    assert [warning for warning in metrics["warnings"] if "observed" in warning] == [
        "turned.weight: the inputs of its ConvTranspose1d layer are not observed, so its zeros were chosen by "
        f"{unseen}"
    ]
    state = torch.export.load(io.BytesIO(stored(result))).state_dict  # floats without zeros
    assert state["wide.weight_values"].numel() == round((1 - share) * 64 * 640)
    wide = next(layer for layer in metrics["layers"] if layer["name"] == "wide")
    assert wide["bytes_after"] == state["wide.weight_values"].nbytes + state["wide.weight_mask"].nbytes


@pytest.mark.parametrize(
    ("method", "trains"), [("fisher_unstructured", False), ("gradient_stability_unstructured", True)]
)
def test_gradients_choose_zeros_over_all_shards(
    place: Path, spec_text: str, monkeypatch: pytest.MonkeyPatch, method: str, trains: bool
) -> None:
    prune = f"prune: {{method: {method}, sparsity: 0.7, scope: global}}"
    trained = ["train: {epochs: 1, lr: 1.0e-3}"] if trains else ["collect: {batch_size: 100}"]
    item = spec(place, [*trained, prune], spec_text)
    # A chunk for each shard: sums of two tasks are merged.
    monkeypatch.setattr(plan_builder, "CHUNK_BYTES", 1)
    result = run_fleet(item, executor="inline")
    metrics = metrics_of(result)
    assert not any("observed" in warning for warning in metrics["warnings"])
    sizes = {"wide": 64 * 640, "narrow": 640 * 16, "gru": 2 * 48 * 16, "turned": 16 * 16, "head": 160}
    shares = {layer["name"]: layer["sparsity"] for layer in metrics["layers"]}
    zeros = sum(shares[name] * size for name, size in sizes.items())
    assert zeros == pytest.approx(0.7 * sum(sizes.values()), abs=2)
    assert max(shares.values()) - min(shares.values()) > 0.2
    if trains:
        return
    program = load_program(open_store(str(place)).get("models/net.pt2"))
    sums = GradientStatistics(layers={}, batches=0)
    for shard in ("train-0", "train-1"):
        with np.load(io.BytesIO(open_store(str(place)).get(f"data/{shard}.npz"))) as found:
            data = {name: torch.from_numpy(found[name]) for name in found.files}
        part = collect(program, data, 100, loss="cross_entropy", seed=0, weights=True)
        sums = part if shard == "train-0" else sums.merge(part)
    options = {"method": method, "sparsity": 0.7, "scope": "global"}
    wanted = zero_layers(layers(program), tensors(program), options, None, sums.moments()).weights
    artifact = load_artifact(f"{result.output}/models/net/{result.models[0].digest}")
    assert isinstance(artifact, nn.Module)
    for name in ("wide.weight", "narrow.weight", "turned.weight", "head.weight"):
        assert torch.equal(artifact.get_parameter(name), wanted[name].values)


def test_one_threshold_for_all_layers(place: Path, spec_text: str) -> None:
    prune = "prune: {method: magnitude_unstructured, sparsity: 0.7, scope: global}"
    metrics = metrics_of(run_fleet(spec(place, [prune], spec_text), executor="inline"))
    shares = [layer["sparsity"] for layer in metrics["layers"]]
    assert max(shares) - min(shares) > 0.2


def test_checkpoints_take_what_needs_no_gradients(tmp_path: Path, place: Path) -> None:
    import safetensors.torch

    (tmp_path / "models").mkdir()
    safetensors.torch.save_file({"a.weight": torch.randn(8, 8)}, str(tmp_path / "models/model.safetensors"))
    text = (
        f"version: 1\nname: x\noutput: {tmp_path}/out\n"
        f"models: [{{source: {tmp_path}/models/model.safetensors, recipe: r, data: d}}]\n"
        f"data: {{d: {{train: {place}/data/test.npz, loss: cross_entropy}}}}\n"
    )
    for steps, asks in (
        ("prune: {method: magnitude_unstructured, sparsity: 0.5, scope: global}", "prune with scope global"),
        ("prune: {method: fisher_unstructured, sparsity: 0.5}", "prune by fisher_unstructured"),
        ("prune: {method: magnitude_n_m, pattern: 2:4}", None),
    ):
        problems = preview(parse_spec(f"{text}recipes: {{r: {{{steps}}}}}\n", "spec.yaml")).problems
        assert [asks in str(problem["reason"]) for problem in problems] == [True] * bool(asks)
