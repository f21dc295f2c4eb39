"""Whole runs over a fleet in which every file that can carry code does: none of it runs, and the good model beside it
is published. The payloads leave a mark; other tests and the last ones here show that they would."""

import copy
import io
import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from loading import load
from safetensors.torch import save

from fleetpress.jobs import run_fleet
from fleetpress.jobs.artifacts import verify
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.store import open_store

STORAGE = Path(__file__).parents[1] / "storage"
# The archives that are tested one by one with the loader, and what they are made of.
load("fleetpress_test_archive_members", STORAGE / "archive_members.py")
ARCHIVES = load("fleetpress_planted_archives", STORAGE / "test_planted_archives.py")
HARMLESS = set(ARCHIVES.DROPPED)  # what a program does not need is left out, and the program is used
FACTORY = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
"""
REMOTE = """
from pathlib import Path
Path({mark!r}).touch()
class Planted: pass
"""
CONFIG = {
    "model_type": "planted",
    "auto_map": {"AutoModel": "modeling_planted.Planted", "AutoConfig": "modeling_planted.Planted"},
    "trust_remote_code": True,
    "custom_pipelines": {"text": {"impl": "modeling_planted.Planted"}},
}


class Fleet:
    """Files, models and data of a spec, and the marks that would be left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.files: dict[str, bytes] = {}
        self.models: list[dict[str, Any]] = []
        self.data: dict[str, Any] = {}

    def mark(self, name: str) -> str:
        return str(self.marks / name)

    def add(self, name: str, file: str, content: bytes, **model: Any) -> None:
        self.files[f"in/{file}"] = content
        self.models.append({"name": name, "source": f"{self.folder}/in/{file}", "recipe": "pack", **model})

    def run(self, *, allow_code: bool = False) -> FleetResult:
        store = open_store(str(self.folder))
        for key, content in self.files.items():
            store.put(key, content)
        recipe = {"train": {"batch_size": 4}, "quantize": {"scheme": "W8A16"}, "validate": {"max_drop": 1.0}}
        spec = {
            "version": 1,
            "name": "planted",
            "output": f"{self.folder}/out",
            "models": self.models,
            "data": self.data,
            "recipes": {"pack": {"quantize": {"scheme": "W8A16"}}, "learn": recipe},
        }
        return run_fleet(
            parse_spec(yaml.safe_dump(spec), "spec.yaml"), executor="inline", allow_code=allow_code
        )

    def left(self) -> list[str]:
        return sorted(path.name for path in self.marks.iterdir())


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A good model with its data; modules that leave a mark when they are imported lie on the path."""
    found = Fleet(tmp_path)
    code = tmp_path / "code"
    code.mkdir()
    (code / "planted_module.py").write_text(f"open({found.mark('import')!r}, 'w')\n")
    (code / "planted_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(code))
    for name in ("planted_module", "planted_factory"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    samples = {"inputs": np.ones((8, 3), np.float32), "targets": np.arange(8) % 2}
    found.files |= {
        "data/good.npz": npz(samples),
        "data/eval.npz": npz({**samples, "inputs": 2 * samples["inputs"]}),
    }
    found.data["points"] = {"train": f"{tmp_path}/data/good.npz", "eval": f"{tmp_path}/data/eval.npz"}
    found.add("good", "good.pt2", ARCHIVES.PLAIN, data="points", recipe="learn")
    return found


def npz(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def check(fleet: Fleet, result: FleetResult, reasons: dict[str, str]) -> None:
    """The good model is published and every other one failed for its reason; no code has run."""
    assert fleet.left() == []
    found = {model.name: (model.state, model.reason or "") for model in result.models}
    assert found.pop("good") == ("published", "")
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        state, said = found[name]
        if not reason:
            assert (name, state, said) == (name, "published", "")
            continue
        assert (name, state) == (name, "failed")
        assert re.search(reason, said), f"{name}: {said}"
        assert "internal error" not in said


def test_archives(fleet: Fleet) -> None:
    reasons = {}
    for name, plant in {**ARCHIVES.LIVE, **ARCHIVES.OTHERS}.items():
        slug = re.sub(r"\W+", "-", name).strip("-") + f"-{len(reasons)}"
        members = copy.deepcopy(ARCHIVES.unpacked())
        plant(members, fleet.mark(slug))
        fleet.add(slug, f"{slug}.pt2", ARCHIVES.packed(members), data="points", recipe="learn")
        reasons[slug] = "" if name in HARMLESS else rf"in/{re.escape(slug)}\.pt2: "
    assert len(reasons) > 20
    result = fleet.run()
    check(fleet, result, reasons)
    for model in result.models:
        if model.state == "published":
            assert verify(f"{result.output}/models/{model.name}") == []
    assert fleet.left() == []


def test_pickles_under_every_name(fleet: Fleet) -> None:
    factory = {"factory": "planted_factory:net", "data": "points"}
    reasons = {}
    (fleet.folder / "code" / "planted_factory.py").write_text(FACTORY.replace("Path(__file__)", "#"))

    def add(name: str, file: str, make: Callable[[str], bytes], reason: str, **model: Any) -> None:
        fleet.add(name, file, make(fleet.mark(name)), **model)
        reasons[name] = reason

    def plain(mark: str) -> bytes:
        return pickle.dumps(ARCHIVES.Payload(mark))

    def beside_weights(mark: str) -> bytes:
        buffer = io.BytesIO()
        torch.save({"0.weight": torch.zeros(4, 3), "extra": ARCHIVES.Payload(mark)}, buffer)
        return buffer.getvalue()

    def old_format(mark: str) -> bytes:
        buffer = io.BytesIO()
        torch.save(ARCHIVES.Payload(mark), buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()

    for suffix in ("pt", "pth", "bin"):
        add(f"zip-{suffix}", f"zip.{suffix}", ARCHIVES.torch_pickle, "pickled code", **factory)
        add(f"old-{suffix}", f"old.{suffix}", old_format, "pickled code", **factory)
        add(f"plain-{suffix}", f"plain.{suffix}", plain, "in/plain", **factory)
        add(f"mixed-{suffix}", f"mixed.{suffix}", beside_weights, "pickled code", **factory)
    add("pickle-pt2", "pickle.pt2", plain, r"in/pickle\.pt2")
    add("torch-pt2", "torch.pt2", ARCHIVES.torch_pickle, r"in/torch\.pt2")
    add("pickle-safetensors", "pickle.safetensors", plain, r"in/pickle\.safetensors")
    check(fleet, fleet.run(allow_code=True), reasons)


def test_data_with_pickled_arrays(fleet: Fleet) -> None:
    def planted(mark: str) -> Any:
        return np.array([ARCHIVES.Payload(mark)] * 8, dtype=object)

    rows = np.ones((8, 3), np.float32)
    kinds: dict[str, Callable[[str], bytes]] = {
        "inputs": lambda mark: npz({"inputs": planted(mark), "targets": np.arange(8) % 2}),
        "targets": lambda mark: npz({"inputs": rows, "targets": planted(mark)}),
        "spare": lambda mark: npz({"inputs": rows, "targets": np.arange(8) % 2, "spare": planted(mark)}),
        "pickle": lambda mark: pickle.dumps(ARCHIVES.Payload(mark)),
    }
    reasons = {}
    for name, make in kinds.items():
        fleet.files[f"data/{name}.npz"] = make(fleet.mark(name))
        fleet.data[name] = {
            "train": f"{fleet.folder}/data/{name}.npz",
            "eval": f"{fleet.folder}/data/eval.npz",
        }
        fleet.add(f"fed-{name}", f"{name}.pt2", ARCHIVES.PLAIN, data=name, recipe="learn")
        reasons[f"fed-{name}"] = rf"data/{name}\.npz"
    check(fleet, fleet.run(), reasons)


def test_hugging_face_folders(fleet: Fleet) -> None:
    """Weights are read from safetensors, whatever lies beside them; a folder with pickles alone is refused."""
    weights = save({"proj.weight": torch.ones(4, 8), "norm.weight": torch.ones(8)})

    def folder(name: str, **files: bytes) -> None:
        mark = fleet.mark(name)
        everything = {
            "config.json": json.dumps(CONFIG).encode(),
            "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["modeling_planted.Planted"]}}).encode(),
            "modeling_planted.py": REMOTE.format(mark=mark).encode(),
            "__init__.py": REMOTE.format(mark=mark).encode(),
            "pytorch_model.bin": ARCHIVES.torch_pickle(mark),
            "training_args.bin": pickle.dumps(ARCHIVES.Payload(mark)),
            "tokenizer.pkl": pickle.dumps(ARCHIVES.Payload(mark)),
            **files,
        }  # fmt: skip
        fleet.files |= {f"in/{name}/{file}": content for file, content in everything.items()}
        fleet.models.append({"name": name, "source": f"{fleet.folder}/in/{name}/", "recipe": "pack"})

    folder("beside", **{"model.safetensors": weights})
    index = {"weight_map": {"proj.weight": "pytorch_model.bin"}}
    folder("pointed", **{"model.safetensors.index.json": json.dumps(index).encode()})
    folder("alone")
    result = fleet.run()
    check(fleet, result, {"beside": "", "pointed": r"in/pointed", "alone": r"in/alone"})
    assert verify(f"{result.output}/models/beside", deep=True) == []
    published = [info.key for info in open_store(f"{result.output}/models/beside").list()]
    assert not [key for key in published if key.endswith(".bin")]
    assert fleet.left() == []


def test_a_factory_is_imported_only_when_allowed(fleet: Fleet) -> None:
    weights = io.BytesIO()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.save(net.state_dict(), weights)
    fleet.add("built", "built.pt", weights.getvalue(), factory="planted_factory:net", data="points")
    imported = fleet.folder / "code" / "imported"
    check(fleet, fleet.run(), {"built": "--allow-code"})
    assert not imported.exists()
    assert "planted_factory" not in sys.modules
    assert {model.name: model.state for model in fleet.run(allow_code=True).models} == {
        "good": "unchanged",
        "built": "published",
    }
    assert imported.exists()


def test_the_payloads_are_live(fleet: Fleet) -> None:
    """What the tests above plant does leave a mark where somebody loads it."""
    pickle.loads(pickle.dumps(ARCHIVES.Payload(fleet.mark("pickle"))))
    torch.load(io.BytesIO(ARCHIVES.torch_pickle(fleet.mark("torch"))), weights_only=False)
    array = npz({"a": np.array([ARCHIVES.Payload(fleet.mark("npz"))], dtype=object)})
    np.load(io.BytesIO(array), allow_pickle=True)["a"]
    exec(REMOTE.format(mark=fleet.mark("remote")), {})
    assert fleet.left() == ["npz", "pickle", "remote", "torch"]
