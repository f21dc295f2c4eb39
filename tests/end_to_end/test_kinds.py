"""Every kind of program and module down the whole road: one fleet of small nets of many shapes, dtypes and tasks."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import FleetResult, ModelResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import load_program, module_to_program, save_program
from fleetpress.storage.store import open_store

Arrays = dict[str, Tensor]
TRAIN, EVAL = 128, 64


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.outer = nn.Embedding(12, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.outer(torch.relu(self.inner(x))))


class TwoInputs(nn.Module):
    """Categories and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(6, 4), nn.Linear(4 + 5, 20), nn.Linear(20, 3)

    def forward(self, category: Tensor, numbers: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(torch.cat([self.embed(category), numbers], 1))))


class Recurrent(nn.Module):
    """Recurrent layers between layers that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm = nn.Linear(4, 16), nn.LSTM(16, 12, batch_first=True)
        self.gru, self.after, self.head = (
            nn.GRU(12, 12, batch_first=True),
            nn.Linear(12, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.lstm(torch.relu(self.before(x)))[0])
        return self.head(torch.relu(self.after(y[:, -1])))


class Pair(nn.Module):
    """Two outputs; losses and metrics look at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.other = nn.Linear(8, 24), nn.Linear(24, 4), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.inner(x))
        return self.head(hidden), self.other(hidden)


class Encoder(nn.Module):
    """torch's own transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class FixedRows(nn.Module):
    """The batch size stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x.view(16, 2, 4).reshape(16, 8))))


def mlp(inputs: int = 8, outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, outputs))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 4))


def in_train_mode(net: nn.Module, example: list[Tensor]) -> ExportedProgram:
    return torch.export.export(net.train(), tuple(example), dynamic_shapes=({0: Dim("batch", min=2)},))


def with_fixed_batch(net: nn.Module, example: list[Tensor]) -> ExportedProgram:
    return module_to_program(net, [torch.cat([item] * 8) for item in example], dynamic_batch=False)


def features(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(7))


def classes(x: Tensor, count: int = 4) -> Tensor:
    """Told by the mean of the first four features."""
    weights = torch.randn(4, count, generator=torch.Generator().manual_seed(8))
    return (x[..., :4].reshape(len(x), -1, 4).mean(1) @ weights).argmax(1)


def labelled(*shape: int, count: int = 4) -> Arrays:
    x = features(TRAIN + EVAL, *shape)
    return {"inputs": x, "targets": classes(x, count)}


def two_inputs() -> Arrays:
    numbers = features(TRAIN + EVAL, 5)
    category = torch.arange(TRAIN + EVAL) * 7 % 6
    return {"category": category, "numbers": numbers, "targets": (classes(numbers, 3) + category // 3) % 3}


def text() -> Arrays:
    """Each token is three more than the one before."""
    start = torch.arange(TRAIN + EVAL) * 5 % 12
    tokens = (start[:, None] + 3 * torch.arange(6)) % 12
    return {"inputs": tokens, "targets": tokens}


def values() -> Arrays:
    x = features(TRAIN + EVAL, 8)
    return {"inputs": x, "targets": torch.stack([x[:, 0] + x[:, 1], x[:, 2] - x[:, 3]], 1)}


def yes_or_no() -> Arrays:
    x = features(TRAIN + EVAL, 8)
    return {"inputs": x, "targets": (x[:, :3] > 0).float()}


def unlabelled() -> Arrays:
    return {"inputs": features(TRAIN + EVAL, 8)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A net, its data, and what a run of it must say. `quality` is the worst metric that a published model may have."""

    build: Callable[[], nn.Module]
    data: Callable[[], Arrays]
    metric: str = "accuracy"
    quality: float = 0.8
    options: str = ""
    dtype: torch.dtype = torch.float32
    export: Callable[[nn.Module, list[Tensor]], ExportedProgram] = module_to_program
    recipe: str = "full"
    pruned: tuple[str, ...] = ("0",)


CASES = {
    "static-float64": Case(
        build=mlp,
        data=lambda: labelled(8),
        dtype=torch.float64,
        export=with_fixed_batch,
    ),
    "fixed": Case(
        build=FixedRows,
        data=lambda: labelled(8),
        export=with_fixed_batch,
        pruned=("inner",),
    ),
    "pair-bfloat16": Case(
        build=Pair,
        data=lambda: labelled(8),
        dtype=torch.bfloat16,
        pruned=("inner",),
    ),
    "multi-label-float16": Case(
        build=lambda: mlp(8, 3),
        data=yes_or_no,
        quality=0.85,
        options=", loss: bce_with_logits",
        dtype=torch.float16,
    ),
    "two-inputs": Case(build=TwoInputs, data=two_inputs, quality=0.6, pruned=("inner",)),
    "tied": Case(
        build=Tied,
        data=text,
        metric="perplexity",
        quality=1.5,
        options=", loss: causal_lm",
        recipe="with-embedding",
        pruned=("inner", "outer"),
    ),
    "recurrent": Case(
        build=Recurrent,
        data=lambda: labelled(3, 4, count=3),
        quality=0.7,
        pruned=("before", "after"),
    ),
    "train-mode": Case(build=normed, data=lambda: labelled(8), quality=0.75, export=in_train_mode),
    "encoder": Case(
        build=Encoder,
        data=lambda: labelled(3, 16),
        quality=0.7,
        pruned=("layer.self_attn.in_proj_weight", "layer.linear1"),
    ),
    "regression": Case(build=lambda: mlp(8, 2), data=values, metric="r2", options=", metric: r2"),
    "agreeing": Case(build=mlp, data=unlabelled, metric="agreement", quality=0.85, recipe="unlabelled"),
    "alike": Case(
        build=lambda: nn.Sequential(mlp(), nn.Tanh()),
        data=unlabelled,
        metric="cosine",
        quality=0.9,
        recipe="unlabelled",
        pruned=("0.0",),
    ),
}
SPEC_HEAD = """\
version: 1
name: kinds
output: {place}/output
recipes:
  full:
    train: {{epochs: 14, batch_size: 32, lr: 2.0e-2}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    finetune: {{epochs: 2, batch_size: 32, lr: 5.0e-3}}
    quantize: {{num_bits: 6, symmetric: false, group_size: 8}}
    validate: {{max_drop: "15%"}}
  with-embedding:
    train: {{epochs: 14, batch_size: 32, lr: 2.0e-2}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    finetune: {{epochs: 2, batch_size: 32, lr: 5.0e-3}}
    quantize: {{scheme: W8A16, targets: [Linear, Embedding]}}
    validate: {{max_drop: "15%"}}
  unlabelled:
    collect: {{batch_size: 16}}
    prune: {{method: gradient_stability, sparsity: 0.1}}
    finetune: {{epochs: 4, batch_size: 32, lr: 3.0e-3}}
    quantize: {{scheme: W8A16}}
    validate: {{max_drop: 0.2}}
"""


def split(arrays: Arrays) -> tuple[Arrays, Arrays]:
    return {k: v[:TRAIN] for k, v in arrays.items()}, {k: v[TRAIN:] for k, v in arrays.items()}


def cast(arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Arrays:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in arrays.items()}


def write_case(place: Path, name: str, case: Case) -> tuple[str, str]:
    """Writes model and data; the lines of the spec that name them."""
    torch.manual_seed(0)
    train_set, eval_set = split(case.data())
    example = [value[:2] for key, value in cast(train_set, case.dtype).items() if key != "targets"]
    program = case.export(case.build().to(case.dtype), example)
    store = open_store(str(place))
    store.put(f"models/{name}.pt2", save_program(program, compress=False))
    store.put(f"data/{name}/train.npz", npz_bytes(train_set))
    store.put(f"data/{name}/eval.npz", npz_bytes(eval_set))
    model = f'  - {{source: "{place}/models/{name}.pt2", data: {name}, recipe: {case.recipe}}}\n'
    files = f'train: "{place}/data/{name}/train.npz", eval: "{place}/data/{name}/eval.npz"'
    return model, f"  {name}: {{{files}{case.options}}}\n"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> FleetResult:
    place = tmp_path_factory.mktemp("kinds")
    entries = [write_case(place, name, case) for name, case in CASES.items()]
    models, data = ("".join(lines) for lines in zip(*entries, strict=True))
    spec = f"{SPEC_HEAD.format(place=place)}models:\n{models}data:\n{data}"
    return run_fleet(parse_spec(spec, "kinds.yaml"), executor="inline")


@pytest.fixture(scope="module")
def results(fleet: FleetResult) -> dict[str, ModelResult]:
    return {model.name: model for model in fleet.models}


def metrics_of(fleet: FleetResult, model: ModelResult) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        open_store(fleet.output).get(f"models/{model.name}/{model.digest}/metrics.json")
    )
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_program_is_published_smaller_and_good(
    name: str, fleet: FleetResult, results: dict[str, ModelResult]
) -> None:
    case, model = CASES[name], results[name]
    assert (model.state, model.reason) == ("published", None)
    assert model.before is not None
    assert model.after is not None
    assert model.after["metric"] == case.metric
    if case.metric == "perplexity":
        assert model.after["value"] <= case.quality
    else:
        assert model.after["value"] >= case.quality
    layers = {layer["name"]: layer for layer in metrics_of(fleet, model)["layers"]}  # type: ignore[attr-defined]
    assert [layer for layer, facts in layers.items() if facts["removed_units"]] == list(case.pruned)
    assert all(facts["num_bits"] for facts in layers.values() if facts["kind"] != "Embedding")
    if case.pruned:
        assert model.after["parameters"] < model.before["parameters"]
        assert model.after["macs"] < model.before["macs"]


@pytest.fixture(scope="module")
def plain_outputs(
    fleet: FleetResult, results: dict[str, ModelResult], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Tensor]]:
    """Outputs of every published model in a process that cannot import fleetpress."""
    folder = tmp_path_factory.mktemp("plain")
    for name in CASES:
        data = open_store(fleet.output).get(f"models/{name}/{results[name].digest}/model.pt2")
        (folder / f"{name}.pt2").write_bytes(data)
    torch.save({name: list(eval_inputs(case).values()) for name, case in CASES.items()}, folder / "inputs")
    code = """
import sys
sys.modules["fleetpress"] = None
import torch
torch.set_num_threads(1)
torch.set_grad_enabled(False)
outputs = {}
for name, inputs in torch.load("inputs").items():
    result = torch.export.load(f"{name}.pt2").module()(*inputs)
    outputs[name] = [item.detach() for item in (result if isinstance(result, tuple) else (result,))]
torch.save(outputs, "outputs")
"""
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=200)
    found: dict[str, list[Tensor]] = torch.load(folder / "outputs")
    return found


def eval_inputs(case: Case) -> Arrays:
    _, eval_set = split(case.data())
    rows = 16  # as many as the static nets want
    return {name: value[:rows] for name, value in cast(eval_set, case.dtype).items() if name != "targets"}


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_runs_what_load_artifact_gives(
    name: str, fleet: FleetResult, plain_outputs: dict[str, list[Tensor]]
) -> None:
    module = load_artifact(f"{fleet.output}/models/{name}")
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        result = module(*eval_inputs(CASES[name]).values())
    ours = list(result) if isinstance(result, (tuple, list)) else [result]
    assert [value.dtype for value in ours] == [value.dtype for value in plain_outputs[name]]
    for mine, plain in zip(ours, plain_outputs[name], strict=True):
        assert torch.equal(mine, plain)


def test_tied_weight_is_stored_once_and_stays_tied(
    fleet: FleetResult, results: dict[str, ModelResult]
) -> None:
    data = open_store(fleet.output).get(f"models/tied/{results['tied'].digest}/model.pt2")
    program = load_program(data)
    one, other = program.state_dict["embed.weight_packed"], program.state_dict["head.weight_packed"]
    assert one.data_ptr() == other.data_ptr()
    module = load_artifact(f"{fleet.output}/models/tied")
    assert isinstance(module, nn.Module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    assert parameters["embed.weight"] is parameters["head.weight"]
    assert results["tied"].bits_per_weight is not None
    assert results["tied"].bits_per_weight < 12


def test_layers_beside_the_pruned_ones_are_the_recurrent_kinds(
    fleet: FleetResult, results: dict[str, ModelResult]
) -> None:
    layers = metrics_of(fleet, results["recurrent"])["layers"]
    kinds = {layer["kind"]: layer for layer in layers}  # type: ignore[attr-defined]
    for kind in ("LSTM", "GRU"):
        assert kinds[kind]["num_bits"] == 6
        assert kinds[kind]["skipped"] == f"prune: units of a {kind} layer cannot be deleted"
