"""State dicts with the code that builds their module: exported at the door, then like every program."""

import importlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.store import open_store

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.inner(x))))

class Joined(Net):
    def forward(self, left, right):
        return super().forward(torch.cat([left, right], 1))
"""
SPEC = """\
version: 1
name: modules
output: {output}
models:
  - {{source: "{place}/net.pt", factory: "fleet_nets:Net", data: points, recipe: full}}
  - {{source: "{place}/joined.pth", factory: "fleet_nets:Joined", data: pairs, recipe: full}}
  - source: "{place}/alone.bin"
    factory: fleet_nets:Joined
    inputs: {{left: {{shape: [batch, 2]}}, right: {{shape: [batch, 4], dtype: float32}}}}
    recipe: packed
data:
  points: {{train: "{place}/points.npz", eval: "{place}/points-eval.npz"}}
  pairs: {{train: "{place}/pairs.npz", eval: "{place}/pairs-eval.npz"}}
recipes:
  full:
    train: {{epochs: 8, batch_size: 32, lr: 2.0e-2}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    finetune: {{epochs: 2, batch_size: 32, lr: 5.0e-3}}
    quantize: {{scheme: W8A16}}
    validate: {{max_drop: 0.2}}
  packed: {{quantize: {{scheme: W4A16, group_size: 8}}}}
"""


def points(rows: int, seed: int) -> dict[str, Tensor]:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return {"inputs": x, "targets": x[:, :3].argmax(1)}


def pairs(rows: int, seed: int) -> dict[str, Tensor]:
    found = points(rows, seed)
    return {"left": found["inputs"][:, :2], "right": found["inputs"][:, 2:], "targets": found["targets"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """State dicts and data; the code of the nets lies on the import path."""
    folder = tmp_path_factory.mktemp("modules")
    code = tmp_path_factory.mktemp("code")
    (code / "fleet_nets.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(code)
        nets = importlib.import_module("fleet_nets")
        store = open_store(str(folder))
        for file, net in (("net.pt", nets.Net), ("joined.pth", nets.Joined), ("alone.bin", nets.Joined)):
            torch.manual_seed(0)
            buffer = io.BytesIO()
            torch.save(net().state_dict(), buffer)
            store.put(file, buffer.getvalue())
        for name, make in (("points", points), ("pairs", pairs)):
            store.put(f"{name}.npz", npz_bytes(make(160, 0)))
            store.put(f"{name}-eval.npz", npz_bytes(make(64, 1)))
        yield folder


def spec_to(place: Path, output: Path) -> Spec:
    return parse_spec(SPEC.format(place=place, output=output), "spec.yaml")


@pytest.fixture(scope="module")
def fleet(place: Path, tmp_path_factory: pytest.TempPathFactory) -> FleetResult:
    return run_fleet(spec_to(place, tmp_path_factory.mktemp("out")), executor="inline", allow_code=True)


def test_modules_take_the_whole_road(fleet: FleetResult) -> None:
    states = {model.name: (model.state, model.reason) for model in fleet.models}
    assert states == dict.fromkeys(("net", "joined", "alone"), ("published", None))
    for model in fleet.models[:2]:
        assert model.before is not None
        assert model.after is not None
        assert model.after["value"] > 0.7
        assert model.after["parameters"] < model.before["parameters"]


def test_example_inputs_of_data_and_of_the_spec_leave_the_batch_size_free(
    fleet: FleetResult, place: Path
) -> None:
    joined = load_artifact(f"{fleet.output}/models/joined")
    assert isinstance(joined, nn.Module)
    found = pairs(5, 3)
    assert joined(left=found["left"], right=found["right"]).shape == (5, 3)
    alone = load_artifact(f"{fleet.output}/models/alone")
    assert isinstance(alone, nn.Module)
    net = importlib.import_module("fleet_nets").Joined()
    net.load_state_dict(torch.load(place / "alone.bin"))
    for rows in (1, 7):
        found = pairs(rows, 3)
        expected = net.eval()(found["left"], found["right"])
        got = alone(left=found["left"], right=found["right"])
        assert got.shape == (rows, 3)
        assert float((got - expected).detach().abs().max()) < 0.2


def test_other_output_folder_same_bytes(fleet: FleetResult, place: Path, tmp_path: Path) -> None:
    again = run_fleet(spec_to(place, tmp_path), executor="inline", allow_code=True)
    for one, two in zip(fleet.models, again.models, strict=True):
        assert one.digest == two.digest
        key = f"models/{one.name}/{one.digest}/model.pt2"
        assert open_store(fleet.output).get(key) == open_store(again.output).get(key)


def test_code_runs_only_when_it_is_allowed(place: Path, tmp_path: Path) -> None:
    result = run_fleet(spec_to(place, tmp_path), executor="inline")
    assert {model.state for model in result.models} == {"failed"}
    assert all("--allow-code" in (model.reason or "") for model in result.models)
