"""Model files that are damaged, dangerous or out of reach: each fails alone, and says what is wrong with it."""

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fleetpress.storage.archive import write_archive
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

Make = Callable[[bytes, nn.Module, str], bytes]


class Payload:
    """Writes the file `mark` when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.mark, "w")


def torch_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_member(name: str, change: Callable[[bytes, str], bytes], pickled: str = "") -> Make:
    """The good archive with one member changed or added, and one that is a pickle of code."""

    def make(good: bytes, net: nn.Module, mark: str) -> bytes:
        with zipfile.ZipFile(io.BytesIO(good)) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        key = f"archive/{name}"
        members[key] = change(members.get(key, b""), mark)
        if pickled:
            members[f"archive/{pickled}"] = torch_pickle(Payload(mark))
        return write_archive(members, compress=False)

    return make


def pickled_weight(config: bytes, mark: str) -> bytes:
    entries = json.loads(config)
    next(iter(entries["config"].values()))["use_pickle"] = True
    return json.dumps(entries).encode()


def other_weight(value: float) -> Make:
    def make(good: bytes, net: nn.Module, mark: str) -> bytes:
        broken = copy.deepcopy(net)
        with torch.no_grad():
            broken.get_parameter("2.weight")[0, 0] = value
        return save_program(module_to_program(broken, [torch.zeros(2, 4)]), compress=False)

    return make


def safetensors_file(header: dict[str, Any], body: bytes = bytes(64), length: int | None = None) -> Make:
    raw = json.dumps(header).encode()
    return lambda good, net, mark: struct.pack("<Q", len(raw) if length is None else length) + raw + body


def weights(**values: torch.Tensor) -> Make:
    return lambda good, net, mark: safetensors.torch.save(values)


def plain(shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


# name -> (file, how it is made, what its reason says)
FILES: dict[str, tuple[str, Make, tuple[str, ...]]] = {
    "truncated": ("truncated.pt2", lambda good, net, mark: good[: len(good) // 2], ("cut short", "again")),
    "empty": ("empty.pt2", lambda good, net, mark: b"", ("empty", "again")),
    "text": ("text.pt2", lambda good, net, mark: b"not an archive" * 50, ("no ZIP archive", "again")),
    "torn": (
        "torn.pt2",
        lambda good, net, mark: good[:600] + bytes(64) + good[664:],
        ("again",),
    ),
    "pickled_weight": (
        "pickled_weight.pt2",
        with_member("data/weights/model_weights_config.json", pickled_weight, "data/weights/weight_0"),
        ("pickle",),
    ),
    "pickled_constant": (
        "pickled_constant.pt2",
        with_member(
            "data/constants/model_constants_config.json",
            lambda old, mark: json.dumps(
                {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}}
            ).encode(),
            "data/constants/opaque_obj_0",
        ),
        ("opaque_obj_0",),
    ),
    "nan": ("nan.pt2", other_weight(float("nan")), ("2.weight", "NaN")),
    "infinite": ("infinite.pt2", other_weight(float("inf")), ("2.weight", "infinite")),
    "overlapping": (
        "overlapping.safetensors",
        safetensors_file({"a": plain([2, 4], [0, 32]), "b": plain([2, 4], [16, 48])}, bytes(48)),
        ("'b'", "overlap"),
    ),
    "out_of_range": (
        "out_of_range.safetensors",
        safetensors_file({"a": plain([2, 400], [0, 3200])}),
        ("cut short",),
    ),
    "huge_header": ("huge_header.safetensors", safetensors_file({}, length=1 << 62), ("header",)),
    "header_past_the_end": (
        "header_past_the_end.safetensors",
        safetensors_file({}, length=5000),
        ("cut short",),
    ),
    "no_header": ("no_header.safetensors", lambda good, net, mark: b"{}", ("too few",)),
    "no_tensors": ("no_tensors.safetensors", safetensors_file({}, b""), ("no layer",)),
    "nan_tensor": (
        "nan_tensor.safetensors",
        weights(**{"up.weight": torch.full((8, 8), float("nan")), "down.weight": torch.ones(8, 8)}),
        ("up.weight", "NaN"),
    ),
    "infinite_norm": (
        "infinite_norm.safetensors",
        weights(**{"norm.weight": torch.full((8,), float("inf")), "down.weight": torch.ones(8, 8)}),
        ("norm.weight", "infinite"),
    ),
    "only_norms": ("only_norms.safetensors", weights(**{"norm.weight": torch.ones(8)}), ("no layer",)),
    "state": (
        "state.pt",
        lambda good, net, mark: torch_pickle(net.state_dict()),
        ("factory", "--allow-code"),
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def outcome(place: Path, write_fleet: Any, cli: Any, good: bytes, net: nn.Module) -> Any:
    mark = str(place / "mark")
    planted = with_member("data/sample_inputs/model.pt", lambda old, mark: torch_pickle(Payload(mark)))
    files = {f"in/{file}": make(good, net, mark) for file, make, _ in FILES.values()}
    models = [
        {
            "source": f"{place}/in/{file}",
            "recipe": "pack",
            **({"data": "plain"} if file.endswith("2") else {}),
        }
        for file, _, _ in FILES.values()
    ]
    files["in/sample_inputs.pt2"] = planted(good, net, mark)
    models.append({"source": f"{place}/in/sample_inputs.pt2", "recipe": "pack"})
    return cli("run", write_fleet(place, place, files=files, models=models), "--executor", "inline", "--json")


def test_the_good_one_is_published(outcome: Any, place: Path) -> None:
    assert outcome.models["good"]["state"] == "published"
    assert outcome.code == 3
    assert (place / "out/models/good/latest.json").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_bad_one_fails_with_its_reason(name: str, outcome: Any, place: Path) -> None:
    model = outcome.models[name]
    assert model["state"] == "failed"
    for words in (*FILES[name][2], FILES[name][0]):
        assert words in model["reason"]
    assert model["reason"] in outcome.err
    assert not (place / "out/models" / name).exists()


def test_no_planted_code_ran(outcome: Any, place: Path) -> None:
    assert (
        outcome.models["sample_inputs"]["state"] == "published"
    )  # they are not part of a program, and never read
    published = next((place / "out/models/sample_inputs").glob("*/model.pt2"))
    with zipfile.ZipFile(published) as archive:
        assert (
            archive.read("archive/data/sample_inputs/model.pt") == b""
        )  # torch wants the name, not a content
    assert not (place / "mark").exists()


def test_plan_finds_what_headers_show_and_runs_nothing(outcome: Any, place: Path, cli: Any) -> None:
    plan = cli("plan", str(place / "spec.yaml"), "--json")
    assert plan.code == 3
    problems = {problem["model"]: problem["reason"] for problem in json.loads(plan.out)["problems"]}
    seen_in_weights_only = {"nan", "infinite", "nan_tensor", "infinite_norm"}
    assert problems.keys() == FILES.keys() - seen_in_weights_only
    for name, reason in problems.items():
        assert FILES[name][0] in reason
    assert not (place / "mark").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_on_ray(s3_uri: str, tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    """Errors cross processes with their words; a good model beside them is published."""
    chosen = {name: FILES[name] for name in ("text", "overlapping", "nan_tensor")}
    files = {f"in/{file}": make(b"", nn.Identity(), "") for file, make, _ in chosen.values()}
    models = [{"source": f"{s3_uri}/in/{file}", "recipe": "pack"} for file, _, _ in chosen.values()]
    outcome = cli("run", write_fleet(s3_uri, tmp_path, files=files, models=models), "--json")
    assert outcome.code == 3
    assert outcome.models["good"]["state"] == "published"
    for name, (_, _, says) in chosen.items():
        assert outcome.models[name]["state"] == "failed"
        for words in says:
            assert words in outcome.models[name]["reason"]
        assert not open_store(s3_uri).list(f"out/models/{name}/")
