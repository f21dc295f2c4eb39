"""Models of several families, block by block from their checkpoints: the same numbers as transformers' own forward."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, MixtralConfig, OPTConfig, T5Config

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.decoder.observing import Observer
from fleetpress.compression.decoder.passage import Batch, advanced, check_independent, embedded, scores
from fleetpress.compression.decoder.skeleton import Skeleton
from fleetpress.compression.errors import DataMismatchError, ProgramError

SHAPES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
# Two kinds of attention, scaled embeddings, a capped tied head; learned positions; experts held in one tensor.
CONFIGS = {
    "gemma2": Gemma2Config(**SHAPES, head_dim=8, sliding_window=4),
    "opt": OPTConfig(**SHAPES, ffn_dim=24, word_embed_proj_dim=16),
    "mixtral": MixtralConfig(**SHAPES, num_local_experts=3, num_experts_per_tok=2),
}
IDS = torch.randint(3, 50, (3, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0
BATCH = Batch(input_ids=IDS, attention_mask=MASK)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, its weights not only those of the beginning."""
    place = tmp_path_factory.mktemp("families")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(place / name)
    return place


def skeleton_of(place: Path) -> tuple[Skeleton, dict[str, Tensor]]:
    values = load_file(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    made = Skeleton(
        config,
        values,
        lambda names: {name: values[name] for name in names},
        lambda name, rows: values[name][rows],
    )
    return made, values


def whole(place: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        place, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_the_whole_model(family: str, models: Path) -> None:
    skeleton, values = skeleton_of(models / family)
    check_independent(skeleton, BATCH)
    skeleton.embed_only(IDS)
    hidden = embedded(skeleton, BATCH)
    skeleton.embed_nothing()
    for index in range(len(skeleton.blocks)):
        assert all(parameter.is_meta for parameter in skeleton.blocks[index].parameters())
        skeleton.fill(index, {name: values[name] for name in skeleton.names_of(index)})
        hidden = advanced(skeleton, index, BATCH, hidden)
        skeleton.empty(index)
    with torch.no_grad():
        expected = whole(models / family)(input_ids=IDS, attention_mask=MASK).logits
    kept = MASK.bool()
    assert torch.equal(scores(skeleton, BATCH, hidden)[kept], expected[kept])


def test_experts_read_the_tokens_that_are_sent_to_them(models: Path) -> None:
    skeleton, values = skeleton_of(models / "mixtral")
    model: Any = whole(models / "mixtral")
    seen: list[tuple[Tensor, ...]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=IDS)
    ((states, chosen, _),) = seen
    batch = Batch(input_ids=IDS)
    skeleton.embed_only(IDS)
    hidden = embedded(skeleton, batch)
    skeleton.fill(0, {name: values[name] for name in skeleton.names_of(0)})
    names = {
        name for name in skeleton.names_of(0) if "experts" in name or "q_proj" in name or "k_proj" in name
    }
    found: dict[str, InputStatistics] = {}
    observer = Observer(skeleton, 0, names)
    observer.see(batch, [hidden])
    for together, tensors in observer.found():
        found |= dict.fromkeys(together, InputStatistics.summed([tensors]))
    assert found.keys() == names
    assert found["model.layers.0.self_attn.q_proj.weight"] is found["model.layers.0.self_attn.k_proj.weight"]
    for expert in range(3):
        rows = states[(chosen == expert).any(1)]
        gate, up = (rows @ half.t() for half in experts.gate_up_proj[expert].chunk(2))
        inputs = {"w1": rows, "w3": rows, "w2": torch.nn.functional.silu(gate) * up}
        for kind, expected in inputs.items():
            mine = found[f"model.layers.0.block_sparse_moe.experts.{expert}.{kind}.weight"]
            assert mine.rows == len(rows)
            torch.testing.assert_close(mine.gram[0, 0], expected.t() @ expected)


def test_padding_is_left_out_of_what_layers_read(models: Path) -> None:
    skeleton, values = skeleton_of(models / "opt")
    skeleton.embed_only(IDS)
    hidden = embedded(skeleton, BATCH)
    skeleton.fill(0, {name: values[name] for name in skeleton.names_of(0)})
    name = "model.decoder.layers.0.fc1.weight"
    observer = Observer(skeleton, 0, {name})
    observer.see(BATCH, [hidden])
    ((_, tensors),) = observer.found()
    assert int(tensors["rows"]) == int(MASK.sum())


def _no_tensor(names: Any) -> dict[str, Tensor]:
    raise AssertionError(names)


def _config(name: str) -> dict[str, Any]:
    return dict(CONFIGS[name].to_diff_dict(), model_type=CONFIGS[name].model_type)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: {"model_type": "unheard"}, "cannot read its config.json"),
        (lambda config: config | {"architectures": ["Unheard"]}, "no model class 'Unheard'"),
        (lambda config: config | {"architectures": None}, "no model class None"),
        (
            lambda _: dict(
                T5Config(num_layers=1).to_diff_dict(), architectures=["T5ForConditionalGeneration"]
            ),
            "an encoder and a decoder",
        ),
    ],
)
def test_models_that_are_no_stack_of_blocks(
    change: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    with pytest.raises(ProgramError, match=reason):
        Skeleton(change(_config("opt")), [], _no_tensor, lambda *_: torch.empty(0))


def test_tokens_and_tensors_that_are_not_there(models: Path) -> None:
    skeleton, values = skeleton_of(models / "opt")
    with pytest.raises(DataMismatchError, match="the model has 50 tokens"):
        skeleton.embed_only(torch.tensor([3, 50]))
    name = "model.decoder.layers.1.fc1.weight"
    with pytest.raises(ProgramError, match=r"block 1 has a parameter fc1.weight"):
        skeleton.fill(1, {other: values[other] for other in skeleton.names_of(1) if other != name})
    skeleton.fill(0, {other: values[other] for other in skeleton.names_of(0)})
    skeleton.embed_nothing()
    with pytest.raises(DataMismatchError, match="not finite after block 0"):
        advanced(skeleton, 0, BATCH, torch.full((3, 10, 16), torch.nan))
