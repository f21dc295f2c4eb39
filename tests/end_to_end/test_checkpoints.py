"""Bare checkpoints: folders as transformers writes them and single files, quantized by tensor and used again."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, PreTrainedModel

from fleetpress.compression.quantization import QUANTIZERS
from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.compression.scheme import SCHEMES, QuantScheme
from fleetpress.compression.treatment import fitted
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.artifacts import export, verify
from fleetpress.jobs.checkpoint import layout as checkpoint_layout
from fleetpress.jobs.driver.run import plan_model
from fleetpress.jobs.planning.fleet import resolve
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.jobs.steps import run_step
from fleetpress.jobs.tasks import TaskRecord
from fleetpress.jobs.worker import execute
from fleetpress.storage import store as stores
from fleetpress.storage.checkpoint import open_checkpoint
from fleetpress.storage.errors import SourceChanged
from fleetpress.storage.store import ObjectStore, open_store

SIZES_OF_PLAN = {"SHARD_BYTES": 30_000, "TASK_BYTES": 4_000, "PART_BYTES": 400, "_SMALL_BYTES": 256}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=32)
TIED = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, intermediate_size=32, tie_word_embeddings=True)
BERT = BertConfig(**SIZES, intermediate_size=64, max_position_embeddings=32)
EXTRAS = {"tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}", "merges/list.txt": b"a b\n"}
SPEC = """\
version: 1
name: checkpoints
output: {place}/output
models:
  - {{source: "{place}/llama", recipe: w4}}
  - {{name: llama-asym, source: "{place}/llama", recipe: w4-asym}}
  - {{source: "{place}/tied", recipe: w4}}
  - {{source: "{place}/bert", recipe: w8}}
  - {{name: bert-asym, source: "{place}/bert", recipe: w8-asym}}
  - {{source: "{place}/lone.safetensors", recipe: default}}
recipes:
  w4: {{quantize: {{scheme: W4A16, group_size: 32, ignore: [lm_head]}}}}
  w4-asym: {{quantize: {{scheme: W4A16_ASYM, group_size: 32, ignore: [lm_head]}}}}
  w8: {{quantize: {{scheme: W8A16}}}}
  w8-asym: {{quantize: {{scheme: W8A16_ASYM}}}}
  default: {{quantize: {{scheme: W4A16}}}}
"""
W4 = replace(SCHEMES["W4A16"], group_size=32)
RECIPES = {
    "llama": W4,
    "llama-asym": replace(W4, symmetric=False),
    "tied": W4,
    "bert": SCHEMES["W8A16"],
    "bert-asym": SCHEMES["W8A16_ASYM"],
    "lone": SCHEMES["W4A16"],
}
AUTO = {"llama": AutoModelForCausalLM, "tied": AutoModelForCausalLM, "bert": AutoModel}


def lone() -> dict[str, Tensor]:
    """What language models hold beside ordinary layers; 37 is a prime, 96 divides into groups of 96 at most."""
    shapes = {
        "model.embed_tokens.weight": (20, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.mlp.gate.weight": (4, 32),
        "model.layers.0.mlp.experts.0.up_proj.weight": (16, 37),
        "model.layers.0.mlp.experts.0.down_proj.weight": (16, 96),
        "model.layers.0.mlp.experts.1.down_proj.weight": (16, 192),
        "lm_head.weight": (20, 32),
    }
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()
    }


def write_sources(place: Path) -> None:
    torch.manual_seed(0)
    for name, config in (("llama", LLAMA), ("tied", TIED), ("bert", BERT)):
        model = AUTO[name].from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(place / name, max_shard_size="20KB")
        for path, data in EXTRAS.items():
            open_store(str(place / name)).put(path, data)
    open_store(str(place)).put("lone.safetensors", save(lone()))


def parsed(place: Path | str, text: str = SPEC) -> Spec:
    return parse_spec(text.format(place=place), "spec.yaml")


@dataclass(frozen=True, kw_only=True)
class Read:
    """One request to a store; `length` None: the whole object."""

    place: str
    key: str
    length: int | None
    start: int = 0


class Counting:
    """A store that notes what is read."""

    def __init__(self, store: ObjectStore, reads: list[Read]) -> None:
        self._store, self._reads = store, reads

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        self._reads.append(Read(place=self._store.uri, key=key, length=None))
        return self._store.get(key, etag=etag, most_bytes=most_bytes)

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        self._reads.append(Read(place=self._store.uri, key=key, length=length, start=start))
        return self._store.get_range(key, start, length, etag=etag)

    def read_into(self, key: str, start: int, buffer: memoryview, *, etag: str | None = None) -> None:
        self._reads.append(Read(place=self._store.uri, key=key, length=len(buffer), start=start))
        self._store.read_into(key, start, buffer, etag=etag)


@pytest.fixture(scope="module")
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SIZES_OF_PLAN.items():
            patch.setattr(checkpoint_layout, name, size)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def planned(place: Path, small_shards: None) -> dict[str, int | None]:
    """Bytes of the quantized part by model, as planned before the run."""
    found = preview(parsed(place))
    assert not found.problems
    return {model.name: model.quantized_bytes for model in found.models}


@pytest.fixture(scope="module")
def reads() -> list[Read]:
    return []


@pytest.fixture(scope="module")
def fleet(place: Path, planned: dict[str, int | None], reads: list[Read]) -> FleetResult:
    original = stores._new_store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_new_store", lambda where: Counting(original(where), reads))
        patch.setattr(stores, "_stores", {})
        return run_fleet(parsed(place), executor="inline")


def artifact(fleet: FleetResult, name: str) -> str:
    digest = next(model.digest for model in fleet.models if model.name == name)
    return f"{fleet.output}/models/{name}/{digest}"


def metrics_of(fleet: FleetResult, name: str) -> dict[str, dict[str, object]]:
    metrics = json.loads(open_store(artifact(fleet, name)).get("metrics.json"))
    return {layer["name"]: layer for layer in metrics["layers"]}


def source_tensors(place: Path, name: str) -> dict[str, Tensor]:
    if name == "lone":
        return lone()
    files = sorted((place / name.removesuffix("-asym")).glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def quantized(weight: Tensor, scheme: QuantScheme) -> Tensor:
    own = fitted(scheme, weight.shape[1])
    result: QuantizedWeight = QUANTIZERS["round_to_nearest"].quantize(weight, own)
    return result.dequantize()


@pytest.mark.parametrize("name", RECIPES)
def test_linear_layers_are_quantized_and_all_else_is_kept(name: str, fleet: FleetResult, place: Path) -> None:
    model = next(model for model in fleet.models if model.name == name)
    assert (model.state, model.reason) == ("published", None)
    assert verify(artifact(fleet, name)) == []
    plain = load_artifact(f"{fleet.output}/models/{name}")
    assert isinstance(plain, dict)
    original = source_tensors(place, name)
    assert plain.keys() == original.keys()
    layers = metrics_of(fleet, name)
    kept = ("embed", "lm_head", "norm", "Norm", "mlp.gate.", "bias")
    for key, value in original.items():
        if any(word in key for word in kept):
            assert torch.equal(plain[key], value), key
        else:
            assert torch.equal(plain[key], quantized(value, RECIPES[name])), key
            assert layers[key.removesuffix(".weight")]["num_bits"] == RECIPES[name].num_bits
            assert not torch.equal(plain[key], value), key
    assert {layer for layer, facts in layers.items() if facts["num_bits"] is None} == {
        key.removesuffix(".weight")
        for key, value in original.items()
        if value.dim() == 2 and any(word in key for word in kept)
    }


def test_rows_that_no_group_divides_take_the_largest_size_that_does(fleet: FleetResult) -> None:
    sizes = {name: facts["group_size"] for name, facts in metrics_of(fleet, "lone").items()}
    experts = "model.layers.0.mlp.experts"
    assert sizes[f"{experts}.0.up_proj"] == 37
    assert sizes[f"{experts}.0.down_proj"] == 96
    assert sizes[f"{experts}.1.down_proj"] == 96
    assert metrics_of(fleet, "llama")["model.layers.0.mlp.down_proj"]["group_size"] == 24
    config = json.loads(open_store(artifact(fleet, "llama")).get("config.json"))["quantization_config"]
    groups = {group["weights"]["group_size"]: group["targets"] for group in config["config_groups"].values()}
    assert groups == {32: ["Linear"], 24: [f"model.layers.{index}.mlp.down_proj" for index in range(2)]}
    assert {"lm_head", "model.embed_tokens"} <= set(config["ignore"])
    assert not any("layers" in name for name in config["ignore"])


@pytest.mark.parametrize("name", ["llama", "tied", "bert"])
def test_every_other_file_is_carried_over_and_the_index_is_right(
    name: str, fleet: FleetResult, place: Path
) -> None:
    store = open_store(artifact(fleet, name))
    for path, data in EXTRAS.items():
        assert store.get(path) == data
    others = {item.name for item in (place / name).iterdir() if item.suffix == ".json"}
    for path in others - {"config.json", "model.safetensors.index.json"}:
        assert store.get(path) == (place / name / path).read_bytes()
    config = json.loads(store.get("config.json"))
    del config["quantization_config"]
    assert config == json.loads((place / name / "config.json").read_bytes())
    index = json.loads(store.get("model.safetensors.index.json"))
    files = set(index["weight_map"].values())
    assert files == {info.key for info in store.list() if info.key.endswith(".safetensors")}
    assert len(files) > 1
    checkpoint = open_checkpoint(artifact(fleet, name))
    assert {key: at.file.path for key, at in checkpoint.tensors.items()} == index["weight_map"]
    total = sum(at.info.size_bytes for at in checkpoint.tensors.values())
    assert index["metadata"]["total_size"] == total


def outputs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(torch.arange(18).view(2, 9))[0]
    return result


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_runs_what_is_published(name: str, fleet: FleetResult, place: Path) -> None:
    published = AUTO[name].from_pretrained(artifact(fleet, name), dtype=torch.float32)
    reference = AUTO[name].from_pretrained(place / name, dtype=torch.float32)
    before = outputs(reference)
    missing = reference.load_state_dict(load_artifact(artifact(fleet, name)), strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(outputs(published), outputs(reference))
    assert not torch.equal(before, outputs(reference))


def test_tied_head_is_left_out_and_named(fleet: FleetResult) -> None:
    store = open_store(artifact(fleet, "tied"))
    assert "lm_head" in json.loads(store.get("config.json"))["quantization_config"]["ignore"]
    assert json.loads(store.get("metrics.json"))["warnings"] == ["ignore 'lm_head' matches no layer"]


@pytest.mark.parametrize("name", ["llama-asym", "bert", "bert-asym", "lone"])
def test_dequantized_checkpoint_is_an_ordinary_one(name: str, fleet: FleetResult, tmp_path: Path) -> None:
    written = export(f"{fleet.output}/models/{name}", "safetensors", str(tmp_path))
    assert sorted(written) == sorted(info.key for info in open_store(str(tmp_path)).list())
    assert not {"manifest.json", "metrics.json", "recipe.yaml"} & set(written)
    plain = load_artifact(artifact(fleet, name))
    assert isinstance(plain, dict)
    if name == "lone":
        return
    loaded = AUTO[name.removesuffix("-asym")].from_pretrained(tmp_path, dtype=torch.float32)
    assert not hasattr(loaded.config, "quantization_config")
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.items())
    assert torch.isfinite(outputs(loaded)).all()


def test_reading_is_by_tensor_and_no_task_holds_the_model(
    fleet: FleetResult, reads: list[Read], place: Path
) -> None:
    assert fleet.exit_code == 0
    weights = [read for read in reads if not read.place.startswith(fleet.output)]
    weights = [read for read in weights if read.key.endswith(".safetensors")]
    assert weights
    assert all(read.length is not None for read in weights)
    ranges = [read for read in weights if read.start and read.place.endswith("llama")]
    shard = min(item.stat().st_size for item in (place / "llama").glob("*-00001-of-*.safetensors"))
    assert max(read.length or 0 for read in ranges) < shard  # a run of tensors that make one part at least
    # Two models are made of this source, one range after the other: every byte of a weight is read once for each.
    data = sum(at.info.size_bytes for at in open_checkpoint(str(place / "llama")).tensors.values())
    assert sum(read.length or 0 for read in ranges) == 2 * data


def test_plan_knows_the_bytes_of_the_quantized_part(
    fleet: FleetResult, planned: dict[str, int | None]
) -> None:
    for name in RECIPES:
        layers = metrics_of(fleet, name).values()
        assert planned[name] == sum(layer["bytes_after"] for layer in layers if layer["num_bits"])  # type: ignore[misc]
    assert {model.state for model in preview(parsed(fleet.output.removesuffix("/output"))).models} == {
        "unchanged"
    }


def test_verify_finds_a_damaged_shard(fleet: FleetResult, tmp_path: Path) -> None:
    source, copy = open_store(artifact(fleet, "bert")), open_store(str(tmp_path))
    shard = "model-00002-of-" + next(i.key[-17:] for i in source.list() if i.key.endswith(".safetensors"))
    for info in source.list():
        data = source.get(info.key)
        copy.put(info.key, data[:-1] + bytes([data[-1] ^ 1]) if info.key == shard else data)
    assert verify(str(tmp_path)) == [f"{shard}: its sha256 is not the manifest's"]


def test_what_is_quantized_already_is_refused(fleet: FleetResult, tmp_path: Path) -> None:
    text = (
        SPEC.partition("models:")[0] + "models: [{{source: '" + artifact(fleet, "bert") + "', recipe: w8}}]\n"
    )
    spec = parsed(tmp_path, text + "recipes: {{w8: {{quantize: {{scheme: W8A16}}}}}}\n")
    (model,) = run_fleet(spec, executor="inline").models
    assert model.state == "failed"
    assert model.reason is not None
    assert "quantized already" in model.reason
    assert "compressed-tensors" in model.reason
    (problem,) = preview(spec).problems
    assert "quantized already" in problem["reason"]


def test_a_source_that_changes_during_the_run_is_not_mixed_with_itself(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("lone.safetensors", save(lone()))
    text = SPEC.partition("models:")[0] + 'models: [{{source: "{place}/lone.safetensors", recipe: w8}}]\n'
    spec = parsed(tmp_path, text + "recipes: {{w8: {{quantize: {{scheme: W8A16}}}}}}\n")
    (model,) = resolve(spec).models
    tasks = plan_model(model, spec, "run").tasks
    store.put("lone.safetensors", save({name: value + 1 for name, value in lone().items()}))
    opened, convert = tasks[:2]
    assert isinstance(execute(opened, run_step, spec.output), TaskRecord)
    with pytest.raises(SourceChanged, match=r"lone\.safetensors has changed"):
        run_step(convert)


def test_layers_that_are_stored_transposed_are_refused_with_the_remedy(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    text = SPEC.partition("models:")[0] + 'models: [{{source: "{place}/gpt2", recipe: w8}}]\n'
    spec = parsed(tmp_path, text + "recipes: {{w8: {{quantize: {{scheme: W8A16}}}}}}\n")
    (model,) = run_fleet(spec, executor="inline").models
    assert model.state == "failed"
    assert "Conv1D" in (model.reason or "")
    assert "export the model to a program" in (model.reason or "")


def test_on_ray_the_same_bytes_come_out(
    fleet: FleetResult, place: Path, ray_cluster: None, tmp_path: Path
) -> None:
    text = SPEC.replace("output: {place}", f"output: {tmp_path}")
    result = run_fleet(parsed(place, text), executor="ray")
    assert {model.state for model in result.models} == {"published"}
    inline, ray = open_store(f"{fleet.output}/models"), open_store(f"{result.output}/models")
    keys = [info.key for info in inline.list() if not info.key.endswith("latest.json")]
    assert keys == [info.key for info in ray.list() if not info.key.endswith("latest.json")]
    assert all(inline.get(key) == ray.get(key) for key in keys)


def test_a_layer_that_would_grow_is_kept_with_the_reason(tmp_path: Path) -> None:
    weights = {"odd.weight": torch.randn(8, 131).half(), "even.weight": torch.randn(8, 128).half()}
    open_store(str(tmp_path)).put("net.safetensors", save(weights))
    text = (
        f"version: 1\nname: odd\noutput: {tmp_path}/output\n"
        f"models: [{{source: {tmp_path}/net.safetensors, recipe: w4}}]\n"
        "recipes: {w4: {quantize: {scheme: W4A16}}}\n"
    )
    result = run_fleet(parse_spec(text, "odd.yaml"), executor="inline")
    odd, even = (metrics_of(result, "net")[name] for name in ("odd", "even"))
    assert "131" in odd["skipped"]  # type: ignore[operator]
    assert (odd["bytes_after"], even["num_bits"]) == (odd["bytes_before"], 4)
    assert torch.equal(load_artifact(f"{result.output}/models/net")["odd.weight"], weights["odd.weight"])  # type: ignore[index]
