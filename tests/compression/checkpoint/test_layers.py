"""What a checkpoint's names and shapes tell about its layers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.compression.checkpoint.layers import (
    checkpoint_layers,
    expert_matrices,
    holds_experts,
    model_types,
    select_checkpoint,
)
from fleetpress.compression.errors import TargetError

SHAPES = {
    "model.embed_tokens.weight": (40, 32),
    "model.norm.weight": (32,),
    "model.layers.0.mlp.gate.weight": (4, 32),
    "model.layers.0.mlp.gate_proj.weight": (48, 32),
    "model.layers.0.q_proj.weight": (32, 32),
    "model.layers.0.q_proj.bias": (32,),
    "model.layers.0.conv.weight": (4, 4, 3),
    "model.layers.0.nothing.weight": (0, 32),
    "lm_head.weight": (40, 32),
}
GPT2 = {
    "wte.weight": (40, 32),
    "wpe.weight": (16, 32),
    "h.0.attn.c_attn.weight": (32, 96),
    "h.0.attn.c_attn.bias": (96,),
    "h.0.attn.c_proj.weight": (32, 32),
    "h.0.attn.c_proj.bias": (32,),
    "h.0.mlp.c_proj.weight": (128, 32),
    "h.0.mlp.c_proj.bias": (32,),
}


def test_matrices_are_layers_by_their_paths() -> None:
    kinds = {layer.name: layer.kind for layer in checkpoint_layers(SHAPES)}
    assert kinds.pop("model.embed_tokens") == "Embedding"
    assert set(kinds.values()) == {"Linear"}
    assert kinds.keys() == {
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.q_proj",
        "lm_head",
    }
    (biased,) = (layer for layer in checkpoint_layers(SHAPES) if layer.biases)
    assert biased.biases == ("model.layers.0.q_proj.bias",)


def test_head_and_router_are_kept_unless_they_are_named() -> None:
    layers = checkpoint_layers(SHAPES)
    chosen = select_checkpoint(layers, (), ("lm_haed",))
    assert [layer.name for layer in chosen.layers] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.q_proj",
    ]
    assert chosen.unused_ignores == ("lm_haed",)
    named = select_checkpoint(layers, ("lm_head", "Embedding"), ())
    assert [layer.name for layer in named.layers] == ["model.embed_tokens", "lm_head"]
    with pytest.raises(TargetError, match="lm_head"):
        select_checkpoint(layers, ("lm_haed",), ())


def test_routers_of_every_name_are_kept() -> None:
    kept = ("mlp.gate", "mlp.router", "mlp.shared_expert_gate", "moe.router.layer", "mlp.gate.wg", "score")
    others = ("mlp.gate_proj", "mlp.shared_expert.gate_proj", "attn.output_gate", "gate.proj", "mlp.layer")
    layers = checkpoint_layers({f"model.layers.0.{path}.weight": (8, 32) for path in (*kept, *others)})
    chosen = select_checkpoint(layers, (), ())
    assert [layer.name.removeprefix("model.layers.0.") for layer in chosen.layers] == list(others)


def test_embeddings_are_told_by_their_names() -> None:
    embeddings = ("shared", "encoder.embed_tokens", "embeddings.word_embeddings", "wte", "model.pos_embed")
    others = ("mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj", "shared_mlp.input_linear", "wtf")
    kinds = {
        layer.name: layer.kind
        for layer in checkpoint_layers({f"{n}.weight": (8, 4) for n in embeddings + others})
    }
    assert kinds == dict.fromkeys(embeddings, "Embedding") | dict.fromkeys(others, "Linear")


def test_transposed_layers_are_told_by_their_bias_and_left_alone() -> None:
    layers = {layer.name: layer for layer in checkpoint_layers(GPT2)}
    assert {name: (layer.kind, layer.axis) for name, layer in layers.items()} == {
        "wte": ("Embedding", 0),
        "wpe": ("Embedding", 0),
        "h.0.attn.c_attn": ("Conv1D", 1),
        "h.0.attn.c_proj": ("Conv1D", 1),
        "h.0.mlp.c_proj": ("Conv1D", 1),
    }
    assert not select_checkpoint(tuple(layers.values()), (), ()).layers


# ---- experts that lie in one tensor

QWEN3 = {"model_type": "qwen3_moe", "hidden_size": 32}
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def test_experts_get_the_names_that_readers_look_for() -> None:
    found = expert_matrices(GATE_UP, (2, 48, 32), QWEN3)
    assert [(matrix.name, matrix.first_row, matrix.shape) for matrix in found] == [
        ("model.layers.0.mlp.experts.0.gate_proj.weight", 0, (24, 32)),
        ("model.layers.0.mlp.experts.0.up_proj.weight", 24, (24, 32)),
        ("model.layers.0.mlp.experts.1.gate_proj.weight", 48, (24, 32)),
        ("model.layers.0.mlp.experts.1.up_proj.weight", 72, (24, 32)),
    ]
    found = expert_matrices(DOWN, (2, 32, 24), QWEN3)
    assert [(matrix.name, matrix.first_row, matrix.shape) for matrix in found] == [
        ("model.layers.0.mlp.experts.0.down_proj.weight", 0, (32, 24)),
        ("model.layers.0.mlp.experts.1.down_proj.weight", 32, (32, 24)),
    ]
    (alone,) = expert_matrices("experts.down_proj", (1, 32, 24), QWEN3)
    assert alone.name == "experts.0.down_proj.weight"
    layers = checkpoint_layers({matrix.name: matrix.shape for matrix in found})
    assert [layer.kind for layer in select_checkpoint(layers, (), ()).layers] == ["Linear", "Linear"]


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_matrices_cover_their_tensor(experts: int, inner: int, hidden: int, down: bool) -> None:
    shape = (experts, hidden, inner) if down else (experts, 2 * inner, hidden)
    found = expert_matrices(DOWN if down else GATE_UP, shape, {"hidden_size": hidden})
    row = 0
    for matrix in found:
        assert matrix.first_row == row
        assert matrix.shape[1] == shape[2]
        row += matrix.shape[0]
    assert row == experts * shape[1]
    assert len({matrix.name for matrix in found}) == len(found) == experts * (1 if down else 2)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", "hidden_size": 32}},
        {"hidden_size": 999, "text_config": {"hidden_size": 32}},
        {"hidden_size": 32, "text_config": None},
    ],
)
def test_the_size_is_that_of_the_model_of_text(config: dict[str, Any]) -> None:
    assert len(expert_matrices(GATE_UP, (3, 48, 32), config)) == 6
    assert len(expert_matrices(DOWN, (3, 32, 24), config)) == 3


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt_oss", "hidden_size": 32},
        {"model_type": "openai_privacy_filter", "hidden_size": 32},
        {"model_type": "llama4_text", "hidden_size": 32},
        {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 32}},
        {"model_type": "aria", "text_config": {"model_type": "aria_text", "hidden_size": 32}},
    ],
    ids=lambda config: config["model_type"],
)
def test_experts_that_are_known_to_be_transposed_are_left_alone(config: dict[str, Any]) -> None:
    """Even where their shapes could mean both."""
    for name, shape in (
        (GATE_UP, (4, 32, 32)),
        (GATE_UP, (4, 32, 48)),
        (DOWN, (4, 32, 32)),
        (DOWN, (4, 24, 32)),
    ):
        assert holds_experts(name, shape)
        assert expert_matrices(name, shape, config) == ()


def test_square_experts_of_other_models_are_taken_as_they_are_stored() -> None:
    """OLMoE's are: 2048 inputs, twice 1024 outputs."""
    config = {"model_type": "olmoe", "hidden_size": 64}
    assert [matrix.shape for matrix in expert_matrices(GATE_UP, (1, 64, 64), config)] == [(32, 64)] * 2


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        (GATE_UP, (4, 48, 32), {}),  # no size to tell rows from columns by
        (GATE_UP, (4, 48, 32), {"hidden_size": "32"}),
        (GATE_UP, (4, 32, 48), QWEN3),  # [experts, inputs, outputs] of a model that is not known
        (DOWN, (4, 24, 32), QWEN3),
        (GATE_UP, (4, 47, 32), QWEN3),  # no two halves
        (GATE_UP, (4, 48, 33), QWEN3),
        (GATE_UP, (48, 32), QWEN3),
        (GATE_UP, (1, 4, 48, 32), QWEN3),
        (GATE_UP, (0, 48, 32), QWEN3),
        (GATE_UP + "_bias", (4, 48, 32), QWEN3),
        (GATE_UP + ".weight", (4, 48, 32), QWEN3),
        ("model.layers.0.mlp.shared_experts.gate_up_proj", (4, 48, 32), QWEN3),
        ("model.layers.0.mlp.experts.up_proj", (4, 48, 32), QWEN3),
        ("model.layers.0.mlp.gate_up_proj", (4, 48, 32), QWEN3),
    ],
)
def test_what_is_no_matrix_of_experts_as_far_as_one_knows(
    name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> None:
    assert expert_matrices(name, shape, config) == ()


def test_a_model_and_its_part_for_text_have_types() -> None:
    assert model_types({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}) == {
        "llama4",
        "llama4_text",
    }
    assert "bert" in model_types({"model_type": "bert"})
