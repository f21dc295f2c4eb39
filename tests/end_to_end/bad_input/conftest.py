"""Tiny fleets in which one good model stands beside bad ones, and the command line to run them with."""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from fleetpress.jobs.cli import main
from fleetpress.jobs.demo import npz_bytes
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

RECIPES: dict[str, Any] = {
    "pack": {"quantize": {"scheme": "W8A16"}, "validate": {"max_drop": 0.5}},
    "prune": {"prune": {"method": "magnitude", "sparsity": 0.25}, "validate": {"max_drop": 1}},
    "train": {"train": {"batch_size": 16}, "validate": {"max_drop": 1}},
    "gradients": {"prune": {"sparsity": 0.25}, "validate": {"max_drop": 1}},
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind; `models` are those of a run, by name."""

    code: int
    out: str
    err: str

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return {model["name"]: model for model in json.loads(self.out)["models"]}


def command(*args: str) -> Outcome:
    """One command line in this process; whatever is logged counts as printed, as it is in a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(args)
            except SystemExit as error:  # how argparse leaves
                code = int(error.code or 0)
    finally:
        logging.getLogger().removeHandler(handler)
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """`cli("run", SPEC)` -> Outcome; a traceback on stderr fails the test."""
    return command


@pytest.fixture(scope="session")
def samples() -> dict[str, Tensor]:
    """Inputs [64, 4], and the labels [64] that the good model gives them."""
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return {"inputs": inputs, "targets": _net()(inputs).argmax(1)}


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="session")
def net() -> nn.Module:
    """The good model before it was exported; its layers are `0` and `2`."""
    return _net()


@pytest.fixture(scope="session")
def good() -> bytes:
    """The archive of the good model: it takes inputs [N, 4] and scores 3 classes."""
    return save_program(module_to_program(_net(), [torch.zeros(2, 4)]), compress=False)


@pytest.fixture(scope="session")
def good_files(good: bytes, samples: dict[str, Tensor]) -> dict[str, bytes]:
    """Files of a fleet by key: the good model, and its data."""
    return {
        "in/good.pt2": good,
        "data/train.npz": npz_bytes({name: value[:48] for name, value in samples.items()}),
        "data/test.npz": npz_bytes({name: value[48:] for name, value in samples.items()}),
    }


@pytest.fixture(scope="session")
def write_fleet(good_files: dict[str, bytes]) -> Callable[..., str]:
    """Writes files below a place, and the spec that compresses `models` and the good one; gives the spec's path."""

    def write(
        place: str | Path,
        spec_folder: Path,
        *,
        files: Mapping[str, bytes] | None = None,
        models: list[dict[str, Any]] | None = None,
        data: Mapping[str, Any] | None = None,
        recipes: Mapping[str, Any] | None = None,
        output: str | None = None,
    ) -> str:
        store = open_store(str(place))
        for key, content in (good_files | dict(files or {})).items():
            store.put(key, content)
        digits = {"train": f"{place}/data/train.npz", "eval": f"{place}/data/test.npz"}
        spec = {
            "version": 1,
            "name": "bad",
            "output": output or f"{place}/out",
            "models": [
                {"source": f"{place}/in/good.pt2", "data": "plain", "recipe": "pack"},
                *(models or []),
            ],
            "data": {"plain": digits, **(data or {})},
            "recipes": RECIPES | dict(recipes or {}),
        }
        path = spec_folder / "spec.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        return str(path)

    return write


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """Someone in the folder `place`, with a good model, its data and the good spec `fleet.yaml`."""

    place: Path
    spec: dict[str, Any]
    cli: Callable[..., Outcome] = command

    def wrote(self, *, source: str | None = None, **parts: Any) -> str:
        """A spec with other parts, or another source of its model, written to `fleet.yaml`."""
        if source is not None:
            parts["models"] = [{**self.spec["models"][0], "source": source}]
        (self.place / "fleet.yaml").write_text(yaml.safe_dump(self.spec | parts, sort_keys=False))
        return "fleet.yaml"

    def check(self, outcome: Outcome, code: int, *says: str) -> None:
        """The exit code, the words, and nothing in the output of what could not even begin."""
        told = outcome.out + outcome.err
        assert outcome.code == code, told
        for words in says:
            assert words in told
        assert "Traceback" not in told
        if code in (2, 5):
            assert not (self.place / "out").exists()


@pytest.fixture
def newcomer(tmp_path: Path, good_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Newcomer:
    """Stands in a folder of their own, ready to make mistakes."""
    for key, content in good_files.items():
        open_store(str(tmp_path)).put(key, content)
    monkeypatch.chdir(tmp_path)
    someone = Newcomer(
        place=tmp_path,
        spec={
            "version": 1,
            "name": "first",
            "output": "out",
            "models": [{"source": "in/good.pt2", "data": "plain", "recipe": "pack"}],
            "data": {"plain": {"train": "data/train.npz", "eval": "data/test.npz"}},
            "recipes": {"pack": {"quantize": {"scheme": "W8A16"}, "validate": {"max_drop": 0.5}}},
        },
    )
    someone.wrote()
    return someone
