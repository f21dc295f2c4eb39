"""State dicts and the code that builds their modules: code runs only when allowed, pickled code never."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

CODE = """
from pathlib import Path

from torch import nn

Path(__file__).with_name("imported").touch()


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def wide():
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))


def text():
    return "net"


def needy(size):
    return nn.Linear(size, 3)


class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def branching():
    return Branching(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


number = 3
"""

# model -> factory, file, what its reason says
CASES = {
    "absent": ("no_such_package:net", "state.pt", ("no_such_package", "install")),
    "nameless": ("bad_factories:nett", "state.pt", ("nett", "install")),
    "broken": ("bad_broken:net", "state.pt", ("SyntaxError", "correct its code")),
    "other_shape": (
        "bad_factories:wide",
        "state.pt",
        ("state.pt does not fit", "0.weight", "bad_factories:wide"),
    ),
    "text": ("bad_factories:text", "state.pt", ("gave a str", "torch.nn.Module")),
    "needy": ("bad_factories:needy", "state.pt", ("without arguments", "TypeError", "size")),
    "number": ("bad_factories:number", "state.pt", ("TypeError", "correct its code")),
    "branching": ("bad_factories:branching", "state.pt", ("Branching cannot be exported", "torch.export")),
    "pickled": ("bad_factories:net", "pickled.pt", ("pickled.pt", "pickled code", "open", "not run")),
    "torn": ("bad_factories:net", "torn.pt", ("torn.pt", "again")),
    "nan": ("bad_factories:net", "nan.pth", ("nan.pth", "0.weight", "NaN")),
    "checkpoint_of_training": ("bad_factories:net", "training.pt", ("'epoch'", "state_dict()")),
    "no_example": ("bad_factories:net", "state.pt", ("example inputs", "`data` or `inputs`")),
}


class Payload:
    """Writes the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.mark, "w")


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("code")
    (folder / "bad_factories.py").write_text(CODE)
    (folder / "bad_broken.py").write_text("def net(:\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in ("bad_factories", "bad_broken"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="module")
def spec(place: Path, write_fleet: Any, net: nn.Module) -> str:
    state = net.state_dict()
    files = {
        "in/state.pt": saved(state),
        "in/pickled.pt": saved({**state, "0.bias": Payload(place / "mark")}),
        "in/torn.pt": saved(state)[:-200],
        "in/nan.pth": saved({**state, "0.weight": torch.full((8, 4), float("nan"))}),
        "in/training.pt": saved({"epoch": 3, "weights": state}),
    }
    models = [
        {"name": name, "source": f"{place}/in/{file}", "factory": factory, "recipe": "pack", "data": "plain"}
        for name, (factory, file, _) in CASES.items()
    ]
    del models[-1]["data"]
    return write_fleet(place, place, files=files, models=models)


@pytest.fixture(scope="module")
def forbidden(spec: str, code_folder: Path, cli: Any) -> Any:
    """A first run, without --allow-code."""
    outcome = cli("run", spec, "--executor", "inline", "--json")
    assert not (code_folder / "imported").exists()
    return outcome


@pytest.fixture(scope="module")
def allowed(spec: str, forbidden: Any, cli: Any) -> Any:
    return cli("run", spec, "--executor", "inline", "--json", "--allow-code")


def test_no_code_is_imported_unless_it_is_allowed(forbidden: Any) -> None:
    assert forbidden.code == 3
    assert forbidden.models["good"]["state"] == "published"
    for name, (factory, _, _) in CASES.items():
        assert forbidden.models[name]["state"] == "failed"
        assert "--allow-code" in forbidden.models[name]["reason"]
        assert factory in forbidden.models[name]["reason"]


@pytest.mark.parametrize("name", CASES)
def test_a_bad_one_fails_with_its_reason(name: str, allowed: Any, place: Path) -> None:
    model = allowed.models[name]
    assert model["state"] == "failed", model
    for words in CASES[name][2]:
        assert words in model["reason"]
    assert "internal error" not in model["reason"]
    assert not (place / "out/models" / name).exists()


def test_pickled_code_did_not_run(allowed: Any, place: Path) -> None:
    assert allowed.code == 3
    assert allowed.models["good"]["state"] == "unchanged"
    assert not (place / "mark").exists()
