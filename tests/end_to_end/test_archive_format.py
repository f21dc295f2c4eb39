"""`format: archive` from spec to service: the same weights as a `.pt2`, in a fraction of its bytes."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fleetpress.compression.quantization.rounded_biases import rounded
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.artifacts import dequantize, published, verify
from fleetpress.jobs.cli import main
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.recipe import Recipe
from fleetpress.storage.artifact import resolve
from fleetpress.storage.programs import load_program, module_to_program, save_program
from fleetpress.storage.store import open_store

SPEC = """
version: 1
name: small
output: {place}/{output}
models:
  - {{name: coded, source: {place}/net.pt2, data: points, recipe: coded}}
  - {{name: packed, source: {place}/net.pt2, data: points, recipe: packed}}
  - {{name: rounded, source: {place}/net.pt2, data: points, recipe: rounded}}
  - {{name: whole, source: {place}/net.pt2, recipe: whole}}
  - {{name: llm, source: {place}/llm.safetensors, recipe: coded}}
data:
  points: {{eval: {place}/points.npz, loss: cross_entropy}}
recipes:
  coded: {{quantize: {{scheme: W4A16_ASYM}}, validate: {{max_drop: 0.5}}, format: archive}}
  rounded: {{quantize: {{scheme: W4A16_ASYM, biases: FP8, ignore: head}}, validate: {{max_drop: 0.5}}, format: archive}}
  packed: {{quantize: {{scheme: W4A16_ASYM}}, validate: {{max_drop: 0.5}}}}
  whole: {{prune: {{method: magnitude, sparsity: 0.25}}, format: archive}}
"""


class Net(nn.Module):
    """A convolution with batch normalization, whose counter is no float, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 24, 3), nn.BatchNorm1d(24), nn.Linear(240, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.conv(x)).relu().flatten(1))
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FleetResult]:
    place = tmp_path_factory.mktemp("archive")
    torch.manual_seed(0)
    net, points = Net().eval(), torch.randn(40, 2, 12)
    (place / "net.pt2").write_bytes(save_program(module_to_program(net, [points[:2]])))
    save_file({"layers.0.weight": torch.randn(8, 8)}, place / "llm.safetensors")
    np.savez(place / "points.npz", inputs=points.numpy(), targets=net(points).argmax(1).numpy())
    return place, run_fleet(parse_spec(SPEC.format(place=place, output="out"), "spec"), executor="inline")


def told(run: tuple[Path, FleetResult]) -> dict[str, str]:
    return {model.name: f"{model.state} {model.reason or ''}" for model in run[1].models}


def test_programs_are_published_and_checkpoints_are_told_why_not(run: tuple[Path, FleetResult]) -> None:
    states = told(run)
    assert states["llm"].startswith("failed")
    assert "format archive, which holds programs; delete it" in states["llm"]
    assert {state for name, state in states.items() if name != "llm"} == {"published "}


def test_the_file_is_smaller_and_holds_the_same_weights(run: tuple[Path, FleetResult]) -> None:
    place, _ = run
    entries = {entry["name"]: entry for entry in published(str(place / "out"))}
    assert [entries[name]["format"] for name in ("coded", "packed", "whole")] == ["archive", "pt2", "archive"]
    assert entries["coded"]["after"]["bytes"] < entries["packed"]["after"]["bytes"] / 3
    assert entries["coded"]["after"]["value"] == entries["packed"]["after"]["value"]
    assert entries["coded"]["compression_ratio"] > 3 * entries["packed"]["compression_ratio"]
    coded, packed = (load_artifact(f"{place}/out/models/{name}") for name in ("coded", "packed"))
    assert isinstance(coded, nn.Module)
    assert isinstance(packed, nn.Module)
    ours, theirs = coded.state_dict(), packed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    points = torch.randn(3, 2, 12)
    assert torch.equal(coded(points), packed(points))


def test_biases_of_quantized_layers_are_rounded(run: tuple[Path, FleetResult]) -> None:
    place, result = run
    before = load_program((place / "net.pt2").read_bytes()).state_dict
    after = load_artifact(f"{result.output}/models/rounded").state_dict()
    assert torch.equal(after["conv.bias"], rounded(before["conv.bias"], "FP8"))
    assert torch.equal(after["head.bias"], before["head.bias"])


def test_numbers_are_those_of_the_file(run: tuple[Path, FleetResult]) -> None:
    place, _ = run
    folder = Path(resolve(f"{place}/out/models/coded"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    metrics = json.loads((folder / "metrics.json").read_bytes())
    size = (folder / "model.fpz").stat().st_size
    assert {file["path"]: file["bytes"] for file in manifest["files"]}["model.fpz"] == size
    assert (manifest["format"], manifest["recipe"]["format"]) == ("archive", "archive")
    assert metrics["after"]["bytes"] == size
    assert "latency_packed_ms" not in metrics["after"]  # it has no packed weights to run over
    weights = sum(layer["bytes_after"] for layer in metrics["layers"])
    assert 0.5 * size < weights < size
    assert metrics["bits_per_weight"] < 8 * size / metrics["after"]["parameters"]
    assert all(layer["num_bits"] == 4 for layer in metrics["layers"])


def test_it_is_verified_dequantized_listed_and_reported(run: tuple[Path, FleetResult]) -> None:
    place, _ = run
    uri = f"{place}/out/models/coded"
    assert verify(uri) == []
    assert dequantize(uri, str(place / "plain")) == ["model.pt2"]
    plain = torch.export.load(str(place / "plain" / "model.pt2")).module()
    points = torch.randn(3, 2, 12)
    module = load_artifact(uri)
    assert torch.equal(plain(points), module(points))  # type: ignore[operator]
    for verb in ("list", "status", "report"):
        with redirect_stdout(io.StringIO()) as out:
            main([verb, f"{place}/out"])
        assert "coded" in out.getvalue()


def test_it_is_exported_as_the_packed_program_that_the_recipe_without_format_publishes(
    run: tuple[Path, FleetResult],
) -> None:
    place, _ = run
    target = place / "exported"
    for name in ("coded", "packed"):
        assert main(["export", f"{place}/out/models/{name}", "--to", "pt2", str(target / name)]) == 0
    files = [(target / name / "model.pt2").read_bytes() for name in ("coded", "packed")]
    published_file = open_store(resolve(f"{place}/out/models/packed")).get("model.pt2")
    assert files[0] == files[1] == published_file
    assert main(["export", f"{place}/out/models/coded", "--to", "safetensors", str(target)]) == 0
    module = load_artifact(f"{place}/out/models/coded")
    assert isinstance(module, nn.Module)
    plain = load_file(target / "model.safetensors")
    assert plain.keys() == module.state_dict().keys()
    assert all(torch.equal(plain[name], value) for name, value in module.state_dict().items())


def test_damage_is_found(run: tuple[Path, FleetResult], tmp_path: Path) -> None:
    source, copy = open_store(resolve(f"{run[0]}/out/models/coded")), open_store(str(tmp_path))
    for info in source.list():
        data = source.get(info.key)
        copy.put(info.key, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if info.key == "model.fpz" else data)
    assert verify(str(tmp_path)) == ["model.fpz: its sha256 is not the manifest's"]
    with pytest.raises(Exception, match=r"model.fpz: the file is damaged: .*publish the model again"):
        load_artifact(str(tmp_path))


def test_the_same_bytes_come_again(run: tuple[Path, FleetResult]) -> None:
    place, _ = run
    run_fleet(parse_spec(SPEC.format(place=place, output="again"), "spec"), executor="inline")
    files: Callable[[str], dict[str, bytes]] = lambda output: {  # noqa: E731 said once, used twice
        str(path.relative_to(place / output)): path.read_bytes()
        for path in sorted((place / output / "models").rglob("model.*"))
    }
    assert files("again") == files("out")
    assert len(files("out")) == 4


def test_recipes_that_name_no_format_keep_their_canonical_form() -> None:
    old = {"quantize": {"scheme": "W4A16"}}
    named = {"format": "pt2", **old}
    assert Recipe.model_validate(named).canonical() == Recipe.model_validate(old).canonical()
    assert "format" not in Recipe.model_validate(old).canonical()
    coded = Recipe.model_validate({"format": "archive", **old})
    assert coded.canonical()["format"] == "archive"
    assert Recipe.model_validate(coded.canonical()) == coded
