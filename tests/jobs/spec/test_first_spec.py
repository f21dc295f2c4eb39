"""A first spec: it names what lies there, it is valid, and it can be run as it stands."""

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from fleetpress.jobs.cli import main
from fleetpress.jobs.planning.fleet import resolve
from fleetpress.jobs.spec.first_spec import first_spec
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import ObjectStore

Made = Callable[..., Spec]


@pytest.fixture
def made(store: ObjectStore) -> Made:
    """The first spec of a store with these files, empty ones."""

    def make(*keys: str, place: str = "", output: str | None = None) -> Spec:
        for key in keys:
            store.put(key, b"{}")
        return parse_spec(first_spec(f"{store.uri}/{place}".rstrip("/"), output=output), "fleet.yaml")

    return make


def sources(spec: Spec, store: ObjectStore) -> list[str]:
    return [entry.source.removeprefix(store.uri + "/") for entry in spec.models]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["net.pt2"], ["net.pt2"]),
        (["a.pt2", "b.pt2"], ["*.pt2"]),
        (["a/model.pt2", "b/model.pt2"], ["*/"]),
        (["a/model.pt2", "b/config.json", "b/model.safetensors"], ["a/", "b/"]),
        (["x/a.pt2", "x/b.pt2", "y/c.pt2"], ["x/*.pt2", "y/c.pt2"]),
        (
            ["llm/config.json", "llm/model.safetensors.index.json", "llm/model-00001-of-00001.safetensors"],
            ["llm/"],
        ),
        (["llm/config.json", "llm/model.safetensors", "llm/onnx/model.bin"], ["llm/"]),
        (["w.safetensors", "train-0.safetensors", "test.safetensors"], ["w.safetensors"]),
        (["state.pth"], ["state.pth"]),
        (["net.pt2", ".cache/other.pt2", ".hidden.pt2"], ["net.pt2"]),
        (["net.pt2", "out/runs/r/summary.json", "out/models/net/d/model.pt2"], ["net.pt2"]),
    ],
)
def test_models_are_named(made: Made, store: ObjectStore, keys: list[str], expected: list[str]) -> None:
    assert sources(made(*keys), store) == expected


def test_every_model_is_named_once(made: Made, store: ObjectStore) -> None:
    keys = [
        "a/one.pt2",
        "a/two.pt2",
        "b/model.pt2",
        "c/model.pt2",
        "c/other.safetensors",
        "llm/x/config.json",
    ]
    fleet = resolve(made(*keys, "llm/x/model.safetensors"))
    assert sorted(model.name for model in fleet.models) == ["b", "c", "one", "other", "two", "x"]
    assert fleet.problems == ()


@pytest.mark.parametrize("place", ["net.pt2", "models/*.pt2"])
def test_a_file_or_a_pattern(made: Made, store: ObjectStore, place: str) -> None:
    spec = made("net.pt2", "models/a.pt2", "models/b.pt2", place=place)
    assert sources(spec, store) == [place]


@pytest.mark.parametrize(
    ("shards", "train", "held_out"),
    [
        (["train.npz", "test.npz"], "train.npz", "test.npz"),
        (["train-0.npz", "train-1.npz", "val.npz"], "train-*.npz", "val.npz"),
        (["train_00.parquet", "train_10.parquet", "eval.parquet"], "train_*.parquet", "eval.parquet"),
    ],
)
def test_data_is_found(made: Made, shards: list[str], train: str, held_out: str) -> None:
    spec = made("net.pt2", *(f"digits/{name}" for name in shards))
    (digits,) = spec.data.values()
    assert list(spec.data) == ["digits"]
    assert [str(part[0]).rpartition("/")[2] for part in (digits.train or (), digits.eval or ())] == [
        train,
        held_out,
    ]
    assert (spec.models[0].data, spec.models[0].recipe) == ("digits", "small")


def test_without_data_nothing_needs_any(made: Made) -> None:
    spec = made("net.pt2", "w.safetensors", "train.npz")
    assert spec.data == {}
    assert [entry.recipe for entry in spec.models] == ["w8", "w4"]


def test_a_state_dict_asks_for_its_code(made: Made) -> None:
    assert made("state.pt").models[0].factory == "my_package.models:build"


def test_names_that_yaml_would_read_otherwise(made: Made, store: ObjectStore) -> None:
    assert sources(made("a: b #c/net.pt2"), store) == ["a: b #c/net.pt2"]


def test_where_it_publishes(made: Made, store: ObjectStore) -> None:
    expected = "s3://" + store.uri.split("/")[2] + "/compressed" if "://" in store.uri else "compressed"
    assert made("net.pt2").output == expected
    assert made(output="s3://other/place").output == "s3://other/place"


def test_no_models(made: Made) -> None:
    with pytest.raises(ObjectNotFound, match=r"holds no models; looked for \*\.pt2"):
        made("readme.md")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a program, its data, and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    (tmp_path / "in/net.pt2").write_bytes(save_program(module_to_program(net, [torch.zeros(2, 6)])))
    (tmp_path / "in/weights.safetensors").write_bytes(save({"up.weight": torch.randn(16, 128)}))
    for seed, name in enumerate(("train", "test")):
        inputs = np.random.default_rng(seed).standard_normal((256, 6), dtype=np.float32)
        buffer = io.BytesIO()
        np.savez(buffer, inputs=inputs, targets=inputs[:, :3].argmax(1))
        (tmp_path / f"in/{name}.npz").write_bytes(buffer.getvalue())
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_it_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "in"]) == 0
    told = capsys.readouterr()
    assert told.out == "fleet.yaml\n"
    assert "fleetpress plan fleet.yaml" in told.err
    assert main(["plan", "fleet.yaml"]) == 0
    capsys.readouterr()
    main(["run", "fleet.yaml", "--executor", "inline", "--json"])
    states = {model["name"]: model["state"] for model in json.loads(capsys.readouterr().out)["models"]}
    assert states["weights"] == "published"
    assert states["net"] in ("published", "rejected")


@pytest.mark.usefixtures("folder")
def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("fleet.yaml").write_text("mine")
    assert main(["init", "in"]) == 2
    assert "fleet.yaml exists; name another file" in capsys.readouterr().err
    assert Path("fleet.yaml").read_text() == "mine"
    assert main(["init", "in", "other.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": "other.yaml", "entries": 2}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_names_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in ("init", "plan", "dequantize"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
