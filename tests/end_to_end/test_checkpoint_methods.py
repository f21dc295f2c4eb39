"""What can be done to the weights of a checkpoint, from its folder to what transformers makes of the published one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from fleetpress.compression.quantization import QUANTIZERS, quantize_weight
from fleetpress.compression.scheme import resolve
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.artifacts import dequantize, export, verify
from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import ModelResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.checkpoint import open_checkpoint
from fleetpress.storage.store import open_store

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=80,
    max_position_embeddings=32,
)
MOE = Qwen3MoeConfig(
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=80,
    max_position_embeddings=32,
)
RECIPES = {
    "fp8": "quantize: {scheme: FP8}",
    "fp8-tensor": "quantize: {scheme: FP8, strategy: tensor}",
    "int8": "quantize: {scheme: W8A16, format: int-quantized}",
    "int8-asym": "quantize: {scheme: W8A16_ASYM, format: int-quantized}",
    "w4-tensor": "quantize: {num_bits: 4, strategy: tensor}",
    "w3": "quantize: {scheme: W3A16, group_size: 32}",
    "mse": "quantize: {scheme: W4A16, group_size: 32, method: smallest_error}",
    "bf16": "quantize: {scheme: BF16}",
    "fp16": "quantize: {scheme: FP16}",
    "2of4": 'prune: {method: magnitude_n_m, pattern: "2:4"}',
    "half": "prune: {method: magnitude_unstructured, sparsity: 0.5}",
    "2of4-w4": 'prune: {method: magnitude_n_m, pattern: "2:4"}, quantize: {scheme: W4A16, group_size: 32}',
    "half-fp8": "prune: {method: magnitude_unstructured, sparsity: 0.5}, quantize: {scheme: FP8}",
}


def published(place: Path, recipe: str, *, source: str = "llama") -> ModelResult:
    text = (
        f"version: 1\nname: methods\noutput: {place}/output\n"
        f"models: [{{source: {place}/{source}, recipe: it}}]\nrecipes: {{it: {{{recipe}}}}}\n"
    )
    spec = parse_spec(text, "spec.yaml")
    (planned,) = preview(spec).models
    (model,) = run_fleet(spec, executor="inline").models
    if model.state == "unchanged":  # another test was here
        return model
    assert (model.state, model.reason) == ("published", None)
    uri = f"{place}/output/models/{source}/{model.digest}"
    shards = {
        info.key: info.size_bytes for info in open_store(uri).list() if info.key.endswith(".safetensors")
    }
    assert planned.forecast is not None
    assert {shard["path"]: shard["bytes"] for shard in planned.forecast["shards"]} == shards
    assert verify(uri, deep=True) == []
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense and a mixture-of-experts model, in float32."""
    folder = tmp_path_factory.mktemp("methods")
    torch.manual_seed(0)
    for name, config in (("llama", LLAMA), ("moe", MOE)):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(torch.arange(18).view(2, 9))[0]
    return result


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_makes_of_it_what_the_plain_weights_are(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = published(place, RECIPES[name])
    uri = f"{place}/output/models/llama/{model.digest}"
    plain = load_artifact(uri)
    assert isinstance(plain, dict)
    original = load_file(place / "llama" / "model.safetensors")
    assert plain.keys() == original.keys()
    loaded = AutoModelForCausalLM.from_pretrained(uri)
    reference = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=loaded.dtype)
    before = outputs(reference)
    reference.load_state_dict(plain)
    assert torch.equal(outputs(loaded), outputs(reference))
    assert not torch.equal(outputs(loaded), before) or name in ("bf16", "fp16")
    with pytest.raises(UsageError, match="is a checkpoint, which has no graph; export it --to safetensors"):
        export(uri, "pt2", str(tmp_path))
    dequantize(uri, str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded.dtype)
    assert torch.equal(outputs(again), outputs(reference))


def test_what_each_recipe_does_to_a_weight(place: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(place / "llama" / "model.safetensors")[name]
    result = {}
    for recipe, text in RECIPES.items():
        model = published(place, text)
        uri = f"{place}/output/models/llama/{model.digest}"
        result[recipe] = open_checkpoint(uri), load_artifact(uri)[name]
        if recipe in ("2of4", "half", "2of4-w4", "half-fp8"):
            layers = json.loads(open_store(uri).get("metrics.json"))["layers"]
            assert next(one for one in layers if one["name"] + ".weight" == name)["sparsity"] == 0.5
    dtypes = {
        recipe: one[0].tensors[name].info.dtype for recipe, one in result.items() if name in one[0].tensors
    }
    assert dtypes == {
        **dict.fromkeys(("fp8", "fp8-tensor", "half-fp8"), "F8_E4M3"),
        **dict.fromkeys(("int8", "int8-asym"), "I8"),
        "bf16": "BF16",
        "fp16": "F16",
        **dict.fromkeys(("2of4", "half"), "F32"),
    }
    assert torch.equal(result["bf16"][1], weight.bfloat16())
    zeroed = torch.where(
        weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() // 2).values, 0, weight
    )
    assert torch.equal(result["half"][1], zeroed)
    fours = result["2of4"][1].view(-1, 4)
    assert (fours != 0).sum(1).eq(2).all()
    assert torch.equal(fours, torch.where(fours == 0, 0, weight.view(-1, 4)))
    plain = quantize_weight(
        name, result["2of4"][1], 0, resolve("W4A16", group_size=32), QUANTIZERS["round_to_nearest"]
    )
    assert torch.equal(result["2of4-w4"][1], plain.dequantize())


def fuse(place: Path) -> dict[str, Tensor]:
    """The mixture of experts as a checkpoint that holds the experts of a layer in two tensors."""
    original = load_file(place / "moe" / "model.safetensors")
    fused = {name: value for name, value in original.items() if ".experts." not in name}
    for layer in range(MOE.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        of = [
            {kind: original[f"{prefix}.{e}.{kind}.weight"] for kind in ("gate_proj", "up_proj", "down_proj")}
            for e in range(4)
        ]
        fused[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat([one["gate_proj"], one["up_proj"]]) for one in of]
        )
        fused[f"{prefix}.down_proj"] = torch.stack([one["down_proj"] for one in of])
    from safetensors.torch import save_file

    (place / "fused").mkdir(exist_ok=True)
    save_file(fused, place / "fused" / "model.safetensors", metadata={"format": "pt"})
    (place / "fused" / "config.json").write_bytes((place / "moe" / "config.json").read_bytes())
    return original


def test_experts_in_one_tensor_are_published_as_those_that_stand_for_themselves(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original = fuse(place)
    recipe = "quantize: {scheme: W4A16, group_size: 32}"
    uris = {}
    for source in ("moe", "fused"):
        model = published(place, recipe, source=source)
        uris[source] = f"{place}/output/models/{source}/{model.digest}"
    one, other = (load_artifact(uri) for uri in uris.values())
    assert one.keys() == other.keys() == original.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(one[router], original[router])
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(one[expert], original[expert])
    reference = AutoModelForCausalLM.from_pretrained(place / "moe", dtype=torch.float32)
    for uri in uris.values():
        loaded = AutoModelForCausalLM.from_pretrained(uri, dtype=torch.float32)
        assert not torch.equal(outputs(loaded), outputs(reference))
        dequantize(uri, f"{uri}-plain")
        plain = AutoModelForCausalLM.from_pretrained(f"{uri}-plain", dtype=torch.float32)
        assert torch.equal(outputs(loaded), outputs(plain))


def test_experts_that_nothing_is_done_to_stay_together(place: Path) -> None:
    fuse(place)
    recipe = "quantize: {scheme: W4A16, group_size: 32, targets: ['re:.*self_attn.*']}"
    model = published(place, recipe, source="fused")
    names = open_checkpoint(f"{place}/output/models/fused/{model.digest}").tensors
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert not any(".experts.0." in name for name in names)


def test_deep_verification_finds_what_hashes_cannot(place: Path, tmp_path: Path) -> None:
    """A manifest that was written for wrong bytes: every file is as listed, but not what the source becomes."""
    import hashlib

    from fleetpress.storage.canonical_json import dumps

    model = published(place, RECIPES["w3"])
    source = open_store(f"{place}/output/models/llama/{model.digest}")
    copy = open_store(str(tmp_path))
    manifest = json.loads(source.get("manifest.json"))
    codes = open_checkpoint(source.uri).tensors["model.layers.0.mlp.up_proj.weight_packed"]
    at = codes.info.offset_bytes
    for info in source.list():
        data = source.get(info.key)
        if info.key == "model.safetensors":
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]  # one code, by one step
            for file in manifest["files"]:
                if file["path"] == info.key:
                    file["sha256"] = hashlib.sha256(data).hexdigest()
        copy.put(info.key, data)
    copy.put("manifest.json", dumps(manifest))
    assert verify(str(tmp_path)) == []
    (problem,) = verify(str(tmp_path), deep=True)
    assert problem.startswith("model.layers.0.mlp.up_proj.weight: a weight is ")
