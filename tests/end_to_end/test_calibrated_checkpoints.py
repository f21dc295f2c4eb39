"""Checkpoints whose layers are solved with what they read, block by block: from tokens to what transformers loads."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.quantization import QUANTIZERS, quantize_weight
from fleetpress.compression.quantization.compressed_tensors import pack_checkpoint_weight
from fleetpress.compression.scheme import resolve
from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.artifacts import dequantize, verify
from fleetpress.jobs.executors.inline import InlineExecutor
from fleetpress.jobs.gc import find_leftovers
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.jobs.tasks import Task
from fleetpress.storage.store import open_store

TOKENS, LENGTH, SAMPLES, CHUNK = 60, 12, 10, 4
SHAPES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": TOKENS,
    "max_position_embeddings": 32,
}
MODELS = {
    "llama": LlamaConfig(**SHAPES, num_key_value_heads=1, torch_dtype="bfloat16"),
    "neox": GPTNeoXConfig(**SHAPES, bos_token_id=0, eos_token_id=0),
}
SPANS = ((0,), (1, 2))  # three chunks as two tasks a block
CALIBRATE = f"calibrate: {{samples: {SAMPLES}, batch_size: {CHUNK}}}"
GPTQ = CALIBRATE + ", quantize: {num_bits: 3, symmetric: false, group_size: 16, method: gptq}"


@pytest.fixture(scope="module", autouse=True)
def _two_spans() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleetpress.jobs.checkpoint.samples.SPANS", len(SPANS))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models whose embeddings reach far in some directions, and tokens with padding in one shard."""
    folder = tmp_path_factory.mktemp("calibrated")
    for name, config in MODELS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if name == "llama" else None)
        model.get_input_embeddings().weight.data *= torch.logspace(2, -1, 32).to(model.dtype)
        model.save_pretrained(folder / name)
    drawn = np.random.default_rng(0)
    for shard in range(2):
        mask = np.ones((SAMPLES, LENGTH), dtype=np.int64)
        mask[::3, 9:] = 1 - shard
        ids = drawn.integers(0, TOKENS, (SAMPLES, LENGTH))
        np.savez(folder / f"tokens-{shard}.npz", input_ids=ids, attention_mask=mask)
    mask = mask * (np.arange(LENGTH) < 7)
    np.savez(folder / "held-out.npz", input_ids=ids[::-1].copy(), attention_mask=mask)
    return folder


def spec_of(
    place: Path,
    recipe: str,
    *,
    model: str = "llama",
    output: str = "output",
    held_out: bool = False,
    more: str = "",
) -> Spec:
    held = f', eval: "{place}/held-out.npz"' if held_out else ""
    text = (
        f"version: 1\nname: calibrated\noutput: {place}/{output}\n"
        f"models: [{{source: {place}/{model}, recipe: it, data: tokens}}]\n"
        f'data: {{tokens: {{train: "{place}/tokens-*.npz"{held}}}}}\n'
        f"recipes: {{it: {{{recipe}}}}}\n{more}"
    )
    return parse_spec(text, "spec.yaml")


def published(result: FleetResult, output: Path) -> str:
    (model,) = result.models
    assert model.reason is None
    return f"{output}/models/{model.name}/{model.digest}"


def files_of(uri: str) -> dict[str, bytes]:
    """What an artifact holds, but for the place that its manifest says the source is at."""
    store = open_store(uri)
    return {info.key: store.get(info.key) for info in store.list()}


def batches(place: Path) -> list[tuple[Tensor, Tensor]]:
    """The chunks that the recipe means: 5 of every shard, evenly spread, in runs of 4."""
    ids, mask = [], []
    for shard in range(2):
        arrays = np.load(place / f"tokens-{shard}.npz")
        ids.append(torch.from_numpy(arrays["input_ids"])[::2])
        mask.append(torch.from_numpy(arrays["attention_mask"])[::2])
    return list(zip(torch.cat(ids).split(CHUNK), torch.cat(mask).split(CHUNK), strict=True))


def inputs_in_memory(model: nn.Module, names: list[str], place: Path) -> dict[str, InputStatistics]:
    """What layers of the whole model read, one chunk after the other in each span, and then the spans together."""
    found: dict[str, InputStatistics] = {}
    chunks = batches(place)
    for span in SPANS:
        grams: dict[str, Tensor] = {}
        counts = 0
        for ids, mask in (chunks[number] for number in span):
            seen: dict[str, Tensor] = {}
            hooks = [
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, name=name, seen=seen: seen.__setitem__(name, args[0])
                )
                for name in names
            ]
            with torch.no_grad():
                model(input_ids=ids, **({} if mask.all() else {"attention_mask": mask}))
            for hook in hooks:
                hook.remove()
            counts += int(mask.sum())
            for name, x in seen.items():
                rows = x.flatten(0, 1)[mask.flatten().bool()]
                gram = grams.setdefault(name, torch.zeros(rows.shape[1], rows.shape[1]))
                gram.addmm_(rows.t(), rows)
        for name, gram in grams.items():
            mine = InputStatistics(
                rows=counts,
                total=torch.zeros(1, len(gram), dtype=torch.float64),
                squares=gram.diagonal().double().unsqueeze(0),
                gram=gram[None, None],
                range=torch.zeros(2),
            )
            found[name] = found[name].merge(mine) if name in found else mine
    return found


def solved_in_memory(place: Path, model: str, names: Callable[[int], list[str]]) -> dict[str, Tensor]:
    """The tensors of all layers, from a model in memory that gets its new weights block by block."""
    plain = load_file(place / model / "model.safetensors")
    whole = AutoModelForCausalLM.from_pretrained(place / model, dtype=torch.float32)
    scheme, made = resolve(num_bits=3, symmetric=False, group_size=16), {}
    for block in range(SHAPES["num_hidden_layers"]):
        for name, inputs in inputs_in_memory(whole, names(block), place).items():
            weight = f"{name}.weight"
            coded = quantize_weight(
                weight,
                plain[weight],
                0,
                scheme,
                QUANTIZERS["gptq"],
                statistics=WeightStatistics(inputs=inputs),
            )
            made |= pack_checkpoint_weight(weight, coded)
            plain[weight] = coded.dequantize()
        whole.load_state_dict(plain, strict=False)
    return made


def llama_layers(block: int) -> list[str]:
    attention = [f"model.layers.{block}.self_attn.{name}_proj" for name in "qkvo"]
    return attention + [f"model.layers.{block}.mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def gptq(place: Path) -> str:
    """The llama's artifact, made without disturbance."""
    (planned,) = preview(spec_of(place, GPTQ)).models
    assert planned.forecast is not None
    assert planned.forecast["runs"] == 3 * (2 + 1)
    hidden: list[int] = []

    def look(event: Any, _: Any) -> None:
        keys = [info.key for info in open_store(f"{place}/output").list("records/")]
        hidden.append(sum(key.endswith(".hidden") for key in keys))

    uri = published(run_fleet(spec_of(place, GPTQ), executor="inline", listener=look), place / "output")
    assert planned.tasks == 3 * (2 + 1) + 2
    # Three chunks; hidden states of two blocks at most, and nothing once it is published.
    assert max(hidden) == 2 * 3
    assert {info.key.rpartition(".")[2] for info in open_store(f"{place}/output").list("records/")} == {
        "json"
    }
    assert not find_leftovers(open_store(f"{place}/output"), sleep=lambda _: None).found
    return uri


def test_it_is_what_a_model_in_memory_gives(place: Path, gptq: str) -> None:
    found = load_file(f"{gptq}/model.safetensors")
    expected = solved_in_memory(place, "llama", llama_layers)
    assert len(expected) == 4 * 7 * 3
    assert {name: found[name].tolist() for name in expected} == {
        name: value.tolist() for name, value in expected.items()
    }
    kept = load_file(place / "llama" / "model.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in found if name in kept)
    layers = json.loads(open_store(gptq).get("metrics.json"))["layers"]
    told = {layer["name"]: layer for layer in layers}
    assert told["model.layers.2.mlp.down_proj"]["method"] == "gptq"
    assert told["model.layers.2.mlp.down_proj"]["sqnr_db"] > 5
    assert "method" not in told["lm_head"]
    assert verify(gptq, deep=True) == []


def logits(model: nn.Module, place: Path) -> Tensor:
    (ids, _), *_ = batches(place)
    with torch.no_grad():
        result: Tensor = model.eval()(ids).logits
    return result


def perplexity(model: nn.Module, place: Path) -> float:
    """Of the held-out tokens, without padding."""
    held_out = np.load(place / "held-out.npz")
    ids, mask = (torch.from_numpy(held_out[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        scores = model.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = ids.masked_fill(mask == 0, -100)[:, 1:]
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100)
    return float(loss.exp())


def with_weights(place: Path, model: str, plain: Mapping[str, Tensor]) -> nn.Module:
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(place / model, dtype=torch.float32)
    loaded.load_state_dict(dict(plain))
    return loaded


def test_outputs_change_less_than_by_rounding(place: Path, gptq: str) -> None:
    rounding = GPTQ.replace("method: gptq", "method: round_to_nearest") + ', validate: {max_drop: "500%"}'
    result = run_fleet(spec_of(place, rounding, held_out=True), executor="inline")
    rounded = published(result, place / "output")
    before = logits(AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32), place)
    errors = []
    for uri in (gptq, rounded):
        plain = load_artifact(uri)
        assert isinstance(plain, dict)
        errors.append(float((logits(with_weights(place, "llama", plain), place) - before).square().mean()))
    assert errors[0] < 0.8 * errors[1]
    plain = load_artifact(rounded)
    assert isinstance(plain, dict)
    after = result.models[0].after  # what needs no data is measured, too
    assert after is not None
    assert after["value"] == pytest.approx(perplexity(with_weights(place, "llama", plain), place), rel=1e-4)


def test_the_model_is_measured_on_held_out_tokens(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("fleetpress.jobs.checkpoint.scoring.SCORED_TOKENS", 4)  # of 12
    recipe = GPTQ.replace("symmetric: false, ", "")
    models, begun = [], list[str]()
    for limit in ("1.0e-9", '"500%"'):
        spec = spec_of(place, f"{recipe}, validate: {{max_drop: {limit}}}", held_out=True)
        begun.clear()
        models += run_fleet(
            spec,
            executor="inline",
            listener=lambda event, _: begun.append(f"{event.step}") if event.kind == "started" else None,
        ).models
    rejected, passed = models
    assert rejected.state == "rejected"
    assert "perplexity went from" in (rejected.reason or "")
    assert set(begun) == {"convert", "assemble"}  # another gate, the same work
    assert rejected.after == passed.after
    folders = (place / "llama", f"{place}/output/models/llama/{passed.digest}")
    for side, folder in zip((passed.before, passed.after), folders, strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert side is not None
        assert side["metric"] == "perplexity"
        assert side["value"] == pytest.approx(perplexity(loaded, place), rel=1e-4)


class _LastFirst(InlineExecutor):
    """As many workers that each begin with what came last."""

    @property
    def slots(self) -> int:
        return 3

    def submit(self, task: Task) -> None:
        self._queue.appendleft(task)


def test_workers_in_another_order_give_the_same_bytes(
    place: Path, gptq: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str, run_step: Any, output: str, **_: Any) -> InlineExecutor:
        return _LastFirst(run_step, output)

    monkeypatch.setattr("fleetpress.jobs.driver.run.open_executor", opened)
    # As with little memory: hidden states are read again, rather than two blocks held.
    monkeypatch.setattr("fleetpress.jobs.checkpoint.advancing._Span._fits", lambda _: False)
    order: list[str] = []
    spec = spec_of(place, GPTQ, output="other", more="resources: {memory_per_task: 1GiB}\n")
    uri = published(
        run_fleet(spec, listener=lambda event, _: order.append(f"{event.kind} {event.task}")), place / "other"
    )
    finished = [entry for entry in order if entry.startswith("finished llama/advance[0")]
    assert finished == [f"finished llama/advance[0.{span}]" for span in (1, 0)]
    assert files_of(uri) == files_of(gptq)


@pytest.mark.parametrize("after", ["solve[0.0]", "advance[2.0]"])
def test_a_run_that_was_cut_off_is_gone_on_with(place: Path, gptq: str, after: str) -> None:
    output = f"cut-{after[:5]}"

    def cut(event: Any, _: Any) -> None:
        if event.kind == "finished" and event.task == f"llama/{after}":
            raise KeyboardInterrupt

    assert (
        run_fleet(spec_of(place, GPTQ, output=output), executor="inline", listener=cut).state == "interrupted"
    )
    left = find_leftovers(open_store(f"{place}/{output}"), sleep=lambda _: None).found
    assert {"hidden states", "solved matrices"} <= {item.what for item in left if item.resumable}
    again: list[str] = []
    result = run_fleet(
        spec_of(place, GPTQ, output=output),
        executor="inline",
        listener=lambda event, _: again.append(event.task) if event.kind == "started" else None,
    )
    assert f"llama/{after}" not in again
    assert "llama/advance[0.0]" not in again
    assert files_of(published(result, place / output)) == files_of(gptq)


def test_another_family_by_another_method_is_loaded_by_transformers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = (
        CALIBRATE + ', prune: {method: wanda, pattern: "2:4", ignore: ["re:.*dense"]}'
        ", quantize: {num_bits: 4, group_size: 16, method: coordinate_descent}"
    )
    uri = published(run_fleet(spec_of(place, recipe, model="neox"), executor="inline"), place / "output")
    plain = load_artifact(uri)
    assert isinstance(plain, dict)
    loaded = AutoModelForCausalLM.from_pretrained(uri, dtype=torch.float32)
    dequantize(uri, str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded, place), logits(again, place))
    original = load_file(place / "neox" / "model.safetensors")
    up = plain["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    assert (up.view(-1, 4) == 0).sum(1).ge(2).all()
    assert not torch.equal(up, original["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"])
    layers = json.loads(open_store(uri).get("metrics.json"))["layers"]
    told = {layer["name"]: (layer["sparsity"], layer.get("method")) for layer in layers}
    assert told["gpt_neox.layers.0.mlp.dense_h_to_4h"] == (0.5, "wanda, coordinate_descent")
    assert told["gpt_neox.layers.0.attention.dense"] == (0.0, "coordinate_descent")


def reason(spec: Spec) -> str:
    (model,) = run_fleet(spec, executor="inline").models
    assert model.state == "failed"
    assert model.reason is not None
    return model.reason


def test_what_cannot_be_calibrated_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = spec_of(place, GPTQ, output="errors", more="resources: {memory_per_task: 256MiB}\n")
    assert "block 0 (model.layers.0) needs" in reason(small)
    np.savez(tmp_path / "tokens-0.npz", tokens=np.zeros((2, 3)))
    (tmp_path / "llama").symlink_to(place / "llama")
    assert "`input_ids` [samples, tokens]" in reason(spec_of(tmp_path, GPTQ))
    np.savez(tmp_path / "tokens-0.npz", input_ids=np.full((2, 3), TOKENS))
    assert f"the model has {TOKENS} tokens" in reason(spec_of(tmp_path, GPTQ))
    np.savez(tmp_path / "tokens-0.npz", input_ids=np.zeros((0, 3), dtype=np.int64))
    assert "hold no sample" in reason(spec_of(tmp_path, GPTQ))
    bare = spec_of(place, GPTQ, model="llama/model.safetensors", output="errors")
    assert "has no config.json beside it" in reason(bare)
    finetune = spec_of(place, GPTQ + ", finetune: {}", output="errors")
    assert "asks to finetune, which a bare checkpoint cannot do" in reason(finetune)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else find(name, *more)
    )
    assert "pip install 'fleetpress[hf]'" in reason(spec_of(place, GPTQ, output="errors"))
