"""Recipes that a model cannot do: the model fails, and its reason says which layer, step or name, and what to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store


@dataclass(frozen=True, kw_only=True)
class Bad:
    """What is done to which model file, and what the reason says."""

    recipe: dict[str, Any]
    says: tuple[str, ...]
    model: str = "good.pt2"
    data: str | None = "plain"
    more: dict[str, Any] = field(default_factory=dict)


W8 = {"scheme": "W8A16"}
CASES: dict[str, Bad] = {
    "prune_lstm": Bad(
        recipe={"prune": {"method": "magnitude", "sparsity": 0.5, "targets": ["LSTM"]}},
        says=("LSTM", "lstm"),
        model="recurrent.pt2",
        data=None,
    ),
    "prune_nothing_prunable": Bad(
        recipe={"prune": {"method": "magnitude", "sparsity": 0.5}},
        says=("no unit can be deleted", "weight: output"),
        model="single.pt2",
    ),
    "prune_no_layer": Bad(
        recipe={"prune": {"method": "magnitude", "sparsity": 0.5}}, says=("no",), model="weightless.pt2"
    ),
    "prune_too_little": Bad(
        recipe={"prune": {"method": "magnitude", "sparsity": 0.01}}, says=("0.01", "raise it")
    ),
    "prune_below_thresholds": Bad(
        recipe={"prune": {"mean_threshold": 1.0e-12, "std_threshold": 1.0e-12}},
        says=("thresholds", "raise it"),
    ),
    "prune_unknown": Bad(
        recipe={"prune": {"method": "magnitude", "sparsity": 0.5, "targets": ["Conv2"]}},
        says=("'Conv2'", "layer"),
    ),
    "quantize_unknown": Bad(
        recipe={"quantize": {**W8, "targets": ["Liner"]}}, says=("'Liner'", "did you mean 'Linear'")
    ),
    "quantize_unknown_pattern": Bad(
        recipe={"quantize": {**W8, "targets": ["re:encoder\\..*"]}}, says=("re:encoder", "0", "2")
    ),
    "quantize_nothing_left": Bad(
        recipe={"quantize": {**W8, "ignore": ["Linear"]}}, says=("quantize reaches no layer", "ignore")
    ),
    "quantize_no_layer": Bad(recipe={"quantize": W8}, says=("no layer",), model="weightless.pt2", data=None),
    "search_no_layer": Bad(
        recipe={"auto": {"trials": 1}}, says=("no layer that can be quantized",), model="weightless.pt2"
    ),
    "quantize_only_norms": Bad(recipe={"quantize": W8}, says=("no layer",), model="norms.pt2", data=None),
    "quantize_whole_numbers": Bad(
        recipe={"quantize": W8}, says=("whole.safetensors", "no layer"), model="whole.safetensors", data=None
    ),
    "quantize_twice": Bad(
        recipe={"quantize": W8}, says=("quantized already", "original"), model="packed", data=None
    ),
    "train_a_checkpoint": Bad(
        recipe={"train": {}, "quantize": W8},
        says=("bare checkpoint", "to train", "program"),
        model="bare.safetensors",
    ),
    "prune_a_checkpoint": Bad(
        recipe={"prune": {"sparsity": 0.5}},
        says=("bare checkpoint", "prune", "program"),
        model="bare.safetensors",
    ),
    "checkpoint_unknown": Bad(
        recipe={"quantize": {**W8, "targets": ["up_"]}},
        says=("'up_'", "did you mean 'up'"),
        model="bare.safetensors",
        data=None,
    ),
    "train_without_parameters": Bad(recipe={"train": {}}, says=("nothing to train",), model="weightless.pt2"),
    "train_a_text": Bad(recipe={"train": {}}, says=("tensor",), model="number.pt2"),
}


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)[:, :3]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Number(nn.Module):
    """Its only output is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> int:
        self.head(x)
        return 3


def programs() -> dict[str, bytes]:
    torch.manual_seed(0)
    rows = [torch.zeros(2, 4)]
    nets = {
        "recurrent": (Recurrent(), [torch.zeros(2, 5, 4)]),
        "single": (nn.Linear(4, 3), rows),
        "weightless": (Weightless(), rows),
        "norms": (nn.LayerNorm(4), rows),
        "number": (Number(), rows),
    }
    found = {
        f"in/{name}.pt2": save_program(module_to_program(net, example))
        for name, (net, example) in nets.items()
    }
    weight = {"up.weight": torch.ones(8, 8)}
    found["in/bare.safetensors"] = safetensors.torch.save(weight)
    found["in/whole.safetensors"] = safetensors.torch.save({"up.weight": torch.ones(8, 8, dtype=torch.int32)})
    found["in/packed/model.safetensors"] = found["in/bare.safetensors"]
    found["in/packed/config.json"] = b'{"quantization_config": {"quant_method": "gptq"}}'
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def outcome(place: Path, write_fleet: Any, cli: Any) -> Any:
    models = [
        {
            "name": name,
            "source": f"{place}/in/{case.model}",
            "recipe": name,
            **({"data": case.data} if case.data else {}),
        }
        for name, case in CASES.items()
    ]
    recipes = {name: case.recipe for name, case in CASES.items()}
    spec = write_fleet(place, place, files=programs(), models=models, recipes=recipes)
    return cli("run", spec, "--executor", "inline", "--json")


def test_the_good_one_is_published(outcome: Any) -> None:
    assert outcome.models["good"]["state"] == "published"
    assert outcome.code == 3


@pytest.mark.parametrize("name", CASES)
def test_a_bad_one_fails_with_its_reason(name: str, outcome: Any, place: Path) -> None:
    model = outcome.models[name]
    assert model["state"] == "failed", model
    for words in CASES[name].says:
        assert words in model["reason"]
    assert "internal error" not in model["reason"]
    assert not open_store(str(place / "out")).list(f"models/{name}/")
