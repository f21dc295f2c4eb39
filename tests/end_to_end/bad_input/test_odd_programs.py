"""Programs that are unusual and right are published; what cannot work says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression.evaluation import evaluate
from fleetpress.storage.programs import module_to_program, save_program


class Net(nn.Module):
    """Two layers around which `wrap(scores, inputs)` makes the outputs."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.head, self.wrap = nn.Linear(4, 8), nn.Linear(8, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(torch.relu(self.inner(x))), x)


def chosen_rows(scores: Tensor, x: Tensor) -> Tensor:
    return scores[x[:, 0] > 9]


# name -> (what it gives, words of the reason; None: it is published)
PROGRAMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[str, ...] | None]] = {
    "tuple": (lambda scores, x: (scores, x), None),
    "dict": (lambda scores, x: {"scores": scores, "inputs": x}, None),
    "number_first": (lambda scores, x: (3, scores), None),
    "draws": (lambda scores, x: scores + torch.rand_like(scores) / 1000, None),
    "writes_into_its_input": (lambda scores, x: (scores, x.add_(1)), ("no gradient", "in place")),
    "not_a_number": (lambda scores, x: (scores, x.sqrt()), None),
    "groups_of_four": (lambda scores, x: scores.reshape(-1, 4, 3).reshape(-1, 3), None),
    "no_rows": (lambda scores, x: scores.mean(0, keepdim=True), ("1 rows for", "one row a sample")),
    "single_number": (lambda scores, x: scores.mean(), ("single number", "one row a sample")),
    "decisions": (lambda scores, x: scores.argmax(1), ("int64", "no gradient", "scores")),
    "chosen_rows": (chosen_rows, ("rows for", "one row a sample")),
}
FULL = {
    "train": {"batch_size": 16},
    "prune": {"sparsity": 0.25},
    "finetune": {"batch_size": 16},
    "quantize": {"scheme": "W8A16"},
    "validate": {"max_drop": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def outcome(place: Path, write_fleet: Any, cli: Any) -> Any:
    torch.manual_seed(0)
    files = {
        f"in/{name}.pt2": save_program(module_to_program(Net(wrap), [torch.ones(8, 4)]))
        for name, (wrap, _) in PROGRAMS.items()
    }
    models = [{"source": f"{place}/in/{name}.pt2", "recipe": "full", "data": "plain"} for name in PROGRAMS]
    spec = write_fleet(place, place, files=files, models=models, recipes={"full": FULL})
    return cli("run", spec, "--executor", "inline", "--json")


@pytest.mark.parametrize("name", PROGRAMS)
def test_odd_program(name: str, outcome: Any, place: Path, cli: Any) -> None:
    says, model = PROGRAMS[name][1], outcome.models[name]
    if says is None:
        assert (model["state"], model["reason"]) == ("published", None)
        assert cli("verify", f"{place}/out/models/{name}").code == 0
    else:
        assert model["state"] == "failed"
        for words in says:
            assert words in model["reason"]
        assert not (place / "out/models" / name).exists()


def test_a_program_that_writes_into_its_inputs_does_not_change_the_data(samples: dict[str, Tensor]) -> None:
    program = module_to_program(Net(lambda scores, x: (scores, x.add_(1))), [torch.ones(8, 4)])
    before = samples["inputs"].clone()
    evaluate(program, samples, "accuracy")
    assert torch.equal(samples["inputs"], before)
