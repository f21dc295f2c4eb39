"""What a checkpoint's names and shapes tell about its layers."""

import pytest

from fleetpress.compression.checkpoint.layers import checkpoint_layers, select_checkpoint
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
