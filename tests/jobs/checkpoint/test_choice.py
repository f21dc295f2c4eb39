"""What a recipe does to each tensor of a checkpoint, and what the published config says about it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from fleetpress.compression.errors import TargetError
from fleetpress.compression.treatment import FLOAT, INT, KEPT, PACK, Treatment
from fleetpress.jobs.checkpoint.choice import Choice, choose, config_of
from fleetpress.jobs.errors import ModelError
from fleetpress.jobs.spec.recipe import Recipe
from fleetpress.storage.checkpoint import Checkpoint, TensorLocation
from fleetpress.storage.safetensors_header import TensorInfo
from fleetpress.storage.safetensors_layout import size_of
from fleetpress.storage.sources import SourceFile

Tensors = Mapping[str, tuple[str, Sequence[int]]]
LLAMA: Tensors = {
    "model.embed_tokens.weight": ("F32", (64, 64)),
    "model.layers.0.q_proj.weight": ("F32", (64, 64)),
    "model.layers.0.q_proj.bias": ("F32", (64,)),
    "model.layers.0.down_proj.weight": ("F32", (64, 96)),
    "model.layers.0.mlp.gate.weight": ("F32", (4, 64)),
    "model.layers.0.mask": ("BOOL", (4, 4)),
    "model.norm.weight": ("F32", (64,)),
    "lm_head.weight": ("F32", (64, 64)),
}
Q, DOWN, EMBED, GATE, HEAD = (
    "model.layers.0.q_proj",
    "model.layers.0.down_proj",
    "model.embed_tokens",
    "model.layers.0.mlp.gate",
    "lm_head",
)
GPT2: Tensors = {
    "wte.weight": ("F32", (40, 64)),
    "h.0.c_attn.weight": ("F32", (64, 192)),
    "h.0.c_attn.bias": ("F32", (192,)),
}
MOE: Tensors = {
    "layers.0.q_proj.weight": ("BF16", (32, 32)),
    "layers.0.mlp.experts.gate_up_proj": ("BF16", (2, 48, 32)),
    "layers.0.mlp.experts.down_proj": ("BF16", (2, 32, 24)),
    "norm.weight": ("BF16", (32,)),
}
MOE_CONFIG = {"model_type": "qwen3_moe", "hidden_size": 32}
MATRICES = {f"layers.0.mlp.experts.{e}.{kind}_proj" for e in (0, 1) for kind in ("gate", "up", "down")}
N_M = (("method", "magnitude_n_m"), ("pattern", "2:4"))


def checkpoint(tensors: Tensors, config: Mapping[str, Any] | None = None, shards: int = 1) -> Checkpoint:
    """Headers as they would be read; tensors go to the shards in turn."""
    files = [SourceFile(path=f"model-{n}.safetensors", etag=f"e{n}", bytes=0) for n in range(shards)]
    ends, found = [1000] * shards, {}
    for index, (name, (dtype, shape)) in enumerate(tensors.items()):
        at = index % shards
        size = size_of(dtype, shape)
        info = TensorInfo(name=name, dtype=dtype, shape=tuple(shape), offset_bytes=ends[at], size_bytes=size)
        found[name] = TensorLocation(file=files[at], info=info)
        ends[at] += size
    return Checkpoint(
        uri="s3://b/llm", root="s3://b/llm", config=config, tensors=found, files=tuple(files), other_files=()
    )


def chosen(
    tensors: Tensors, config: Mapping[str, Any] | None = None, *, shards: int = 1, **steps: Any
) -> Choice:
    recipe = Recipe.model_validate(steps).canonical()
    return choose(checkpoint(tensors, config, shards), recipe)


def schemes(choice: Choice) -> dict[str, tuple[int, int | None]]:
    """Bits and group size by layer."""
    return {
        name: (treatment.scheme.num_bits, treatment.scheme.group_size)
        for name, treatment in choice.treated.items()
        if treatment.scheme
    }


def done(choice: Choice) -> dict[str, Treatment]:
    """Treatments by tensor, of those that are changed."""
    return {item.name: item.treatment for item in choice.items if item.treatment != KEPT}


def test_forms_of_experts_that_transformers_does_not_load_are_told() -> None:
    asymmetric = chosen(MOE, MOE_CONFIG, quantize={"scheme": "W4A16_ASYM", "group_size": 8})
    (warning,) = asymmetric.warnings
    assert "transformers loads experts such as layers.0.mlp.experts.0" in warning
    assert not chosen(MOE, MOE_CONFIG, quantize={"scheme": "FP8"}).warnings


def test_the_dtype_of_the_config_follows_a_cast_of_all() -> None:
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "hidden_size": 64}}
    cast = config_of(chosen(LLAMA, config, quantize={"scheme": "BF16", "ignore": (HEAD,)}), config)
    assert cast == {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "hidden_size": 64}}
    assert config_of(chosen(LLAMA, config, quantize={"scheme": "BF16", "targets": (Q,)}), config) == config


# ---- which layers


def test_head_router_embedding_and_norm_are_kept() -> None:
    choice = chosen(LLAMA, quantize={"scheme": "W4A16", "group_size": 32})
    assert schemes(choice) == {Q: (4, 32), DOWN: (4, 32)}
    assert {layer.name for layer in choice.known} == {Q, DOWN, EMBED, GATE, HEAD}
    assert (choice.skipped, choice.warnings) == ({}, ())
    assert done(choice).keys() == {f"{Q}.weight", f"{DOWN}.weight"}
    by_name = {item.name: item for item in choice.items}
    assert by_name.keys() == LLAMA.keys()
    assert (by_name[f"{Q}.weight"].layer, by_name["model.norm.weight"].layer) == (Q, None)
    assert {name for name, item in by_name.items() if not item.check} == {"model.layers.0.mask"}


@pytest.mark.parametrize(
    ("targets", "ignore", "layers"),
    [
        (["lm_head"], [], {HEAD}),
        (["Linear"], [], {Q, DOWN, GATE, HEAD}),
        (["Linear"], ["re:.*gate", "lm_head"], {Q, DOWN}),
        (["Embedding", "re:.*q_proj"], [], {EMBED, Q}),
        ([], [Q], {DOWN}),
    ],
)
def test_targets_and_ignore(targets: list[str], ignore: list[str], layers: set[str]) -> None:
    step = {"scheme": "W8A16", "targets": tuple(targets), "ignore": tuple(ignore)}
    assert schemes(chosen(LLAMA, quantize=step)).keys() == layers
    step = {"method": "magnitude_n_m", "pattern": "2:4", "targets": tuple(targets), "ignore": tuple(ignore)}
    assert chosen(LLAMA, prune=step).treated == dict.fromkeys(layers, Treatment(sparsity=N_M))


def test_ignores_that_match_nothing_are_warned_of_once() -> None:
    ignore = ("lm_haed", "re:.*k_proj", Q)
    choice = chosen(
        LLAMA,
        prune={"method": "magnitude_n_m", "pattern": "2:4", "ignore": ignore},
        quantize={"scheme": "W8A16", "ignore": ignore[:1]},
    )
    assert choice.warnings == ("ignore 'lm_haed' matches no layer", "ignore 're:.*k_proj' matches no layer")


def test_items_lie_in_the_order_of_the_source() -> None:
    choice = chosen(LLAMA, shards=2, quantize={"scheme": "W8A16"})
    places = [(item.path, item.offset_bytes) for item in choice.items]
    assert places == sorted(places)
    assert {item.path: item.etag for item in choice.items} == {
        "model-0.safetensors": "e0",
        "model-1.safetensors": "e1",
    }


# ---- what is done to them


def test_methods_layouts_and_floats() -> None:
    treated = chosen(LLAMA, quantize={"num_bits": 3, "method": "smallest_error", "symmetric": False}).treated
    assert {(t.layout, t.method, t.scheme.symmetric) for t in treated.values() if t.scheme} == {
        (PACK, "smallest_error", False)
    }
    treated = chosen(LLAMA, quantize={"scheme": "W8A16", "format": "int-quantized"}).treated
    assert {t.layout for t in treated.values()} == {INT}
    treated = chosen(LLAMA, quantize={"scheme": "FP8", "strategy": "tensor"}).treated
    assert {(t.layout, t.scheme.type, t.scheme.strategy) for t in treated.values() if t.scheme} == {
        (FLOAT, "float", "tensor")
    }


def test_zeroed_weights_are_quantized_where_both_steps_reach() -> None:
    choice = chosen(
        LLAMA,
        prune={"method": "magnitude_unstructured", "sparsity": 0.5, "targets": (Q, HEAD)},
        quantize={"scheme": "W8A16"},
    )
    half = (("method", "magnitude_unstructured"), ("sparsity", 0.5))
    assert {name: (t.sparsity, t.scheme is None) for name, t in choice.treated.items()} == {
        Q: (half, False),
        HEAD: (half, True),
        DOWN: ((), False),
    }


def test_layers_that_cannot_be_zeroed_are_skipped_with_a_reason() -> None:
    odd = {**LLAMA, "odd.weight": ("F32", (8, 66))}
    choice = chosen(odd, prune={"method": "magnitude_n_m", "pattern": "2:4"})
    assert choice.skipped == {"odd": "prune: rows of 66 do not divide into groups of 4 (pattern 2:4)"}
    assert choice.treated.keys() == {Q, DOWN}


def test_layers_that_would_grow_are_skipped_with_a_reason() -> None:
    small = {**LLAMA, "odd.weight": ("BF16", (8, 13)), "thin.weight": ("BF16", (64, 1))}
    choice = chosen(small, quantize={"scheme": "W4A16", "group_size": 12})
    assert choice.skipped == {
        "odd": "quantize: rows of 13 divide into groups of 1 only: packed it would be larger",
        "thin": "quantize: rows of 1 divide into groups of 1 only: packed it would be larger",
    }
    assert schemes(choice) == {Q: (4, 8), DOWN: (4, 12)}
    choice = chosen(small, quantize={"scheme": "W8A16"})
    assert choice.skipped == {"thin": "quantize: packed it would be larger"}
    assert {item.name for item in choice.items} == small.keys()


# ---- casts


def test_a_cast_is_of_everything_that_floats() -> None:
    tensors = {**LLAMA, "done.weight": ("BF16", (8, 8)), "scale": ("F64", ())}
    choice = chosen(tensors, quantize={"scheme": "BF16"})
    assert choice.treated == dict.fromkeys((Q, DOWN, EMBED, GATE, HEAD), Treatment(cast="BF16"))
    assert done(choice) == dict.fromkeys(
        tensors.keys() - {"done.weight", "model.layers.0.mask"}, Treatment(cast="BF16")
    )


def test_a_cast_with_targets_is_of_these() -> None:
    choice = chosen(LLAMA, quantize={"scheme": "FP16", "targets": (Q, EMBED)})
    assert done(choice) == dict.fromkeys((f"{Q}.weight", f"{EMBED}.weight"), Treatment(cast="F16"))
    choice = chosen(LLAMA, quantize={"scheme": "FP16", "ignore": (HEAD,)})
    assert f"{HEAD}.weight" not in done(choice)


def test_zeroed_weights_are_cast() -> None:
    choice = chosen(LLAMA, prune={"method": "magnitude_n_m", "pattern": "2:4"}, quantize={"scheme": "BF16"})
    assert choice.treated[Q] == Treatment(sparsity=N_M, cast="BF16")
    assert choice.treated[HEAD] == Treatment(cast="BF16")
    same = {name: ("BF16", shape) for name, (dtype, shape) in LLAMA.items() if dtype == "F32"}
    choice = chosen(same, prune={"method": "magnitude_n_m", "pattern": "2:4"}, quantize={"scheme": "BF16"})
    assert choice.treated == dict.fromkeys((Q, DOWN), Treatment(sparsity=N_M))


# ---- experts


def test_experts_are_taken_apart_when_something_is_done_to_them() -> None:
    choice = chosen(MOE, MOE_CONFIG, quantize={"scheme": "W8A16"})
    assert choice.treated.keys() == {"layers.0.q_proj", *MATRICES}
    names = {item.name for item in choice.items}
    assert names == {"layers.0.q_proj.weight", "norm.weight", *(f"{name}.weight" for name in MATRICES)}
    assert all(item.check for item in choice.items)
    covered = 1000
    for item in choice.items:
        assert item.offset_bytes == covered
        covered += item.size_bytes
    assert covered == 1000 + sum(size_of(dtype, shape) for dtype, shape in MOE.values())


def test_experts_that_nothing_is_done_to_stay_in_their_tensor() -> None:
    choice = chosen(MOE, MOE_CONFIG, quantize={"scheme": "W8A16", "ignore": ("re:.*experts.*down_proj",)})
    names = {item.name for item in choice.items}
    assert "layers.0.mlp.experts.down_proj" in names
    assert "layers.0.mlp.experts.gate_up_proj" not in names
    assert len(names) == 3 + 4
    (kept,) = (item for item in choice.items if item.name.endswith("experts.down_proj"))
    assert (kept.shape, kept.treatment, kept.layer) == ((2, 32, 24), KEPT, None)
    one = chosen(MOE, MOE_CONFIG, quantize={"scheme": "W8A16", "targets": ("re:.*experts.1.up_proj",)})
    assert one.treated.keys() == {"layers.0.mlp.experts.1.up_proj"}
    assert len(one.items) == 3 + 4, "what is taken apart for one is taken apart for all in it"
    assert config_of(one, MOE_CONFIG)["quantization_config"]["ignore"][:2] == [
        "layers.0.q_proj",
        "layers.0.mlp.experts.0.gate_proj",
    ]


def test_experts_of_an_unknown_layout_are_kept_and_told() -> None:
    config = {"model_type": "gpt_oss", "hidden_size": 32}
    choice = chosen(MOE, config, quantize={"scheme": "W8A16"})
    assert choice.treated.keys() == {"layers.0.q_proj"}
    assert {item.name for item in choice.items} == MOE.keys()
    assert [warning.split(" holds its experts")[0] for warning in choice.warnings] == [
        "layers.0.mlp.experts.gate_up_proj",
        "layers.0.mlp.experts.down_proj",
    ]
    cast = chosen(MOE, config, quantize={"scheme": "FP16"})
    assert done(cast) == dict.fromkeys(MOE, Treatment(cast="F16"))
    assert cast.warnings == ()


@pytest.mark.parametrize("model_type", ["llama4", "llama4_text"])
def test_llama_4_is_not_quantized_without_its_experts(model_type: str) -> None:
    config = {"model_type": model_type, "hidden_size": 32}
    with pytest.raises(
        ModelError, match=r"s3://b/llm: layers\.0\.mlp\.experts\.gate_up_proj holds its experts"
    ):
        chosen(MOE, config, quantize={"scheme": "W8A16"})
    assert len(done(chosen(MOE, config, quantize={"scheme": "FP16"}))) == len(MOE)


# ---- nothing to do


@pytest.mark.parametrize(
    ("tensors", "steps", "words"),
    [
        (
            GPT2,
            {"quantize": {"scheme": "W8A16"}},
            "its layers are Conv1D, which checkpoints cannot hold packed",
        ),
        (GPT2, {"quantize": {"scheme": "W8A16", "targets": ("Conv1D",)}}, "its layers are Conv1D"),
        (LLAMA, {"quantize": {"scheme": "W8A16", "ignore": ("Linear",)}}, "widen its targets"),
        (
            {"a.weight": ("BF16", (4, 13))},
            {"quantize": {"scheme": "W4A16", "group_size": 4}},
            "a: quantize: rows",
        ),
        ({"a.weight": ("BF16", (4, 8))}, {"quantize": {"scheme": "BF16"}}, "are BF16 already"),
        ({"a.weight": ("I32", (4, 8))}, {"quantize": {"scheme": "W8A16"}}, ""),
        ({"a": ("F32", (4, 8))}, {"prune": {"method": "magnitude_n_m", "pattern": "2:4"}}, ""),
    ],
)
def test_a_recipe_that_reaches_nothing(tensors: Tensors, steps: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=rf"s3://b/llm: the recipe reaches no (layer|tensor); .*{words}"):
        chosen(tensors, **steps)


def test_a_target_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"target 'lm_haed' matches no layer; did you mean 'lm_head'\?"):
        chosen(LLAMA, quantize={"scheme": "W8A16", "targets": ("lm_haed",)})


def test_transposed_layers_are_skipped_by_name() -> None:
    """Their output units are columns: rows packed in groups would be other weights to every reader."""
    tensors = {**GPT2, "head.weight": ("F32", (64, 64))}
    targets = ("h.0.c_attn", "head")
    choice = chosen(tensors, quantize={"scheme": "W8A16", "targets": targets})
    assert choice.treated.keys() == {"head"}
    assert choice.skipped.keys() == {"h.0.c_attn"}
    choice = chosen(tensors, prune={"method": "magnitude_n_m", "pattern": "2:4", "targets": targets})
    assert (choice.treated.keys(), choice.skipped.keys()) == ({"head"}, {"h.0.c_attn"})
    half = {"method": "magnitude_unstructured", "sparsity": 0.5, "targets": targets}
    assert chosen(tensors, prune=half).treated.keys() == set(targets)
    assert chosen(tensors, quantize={"scheme": "BF16", "targets": targets}).treated.keys() == set(targets)


# ---- the config


def test_each_group_size_is_a_group_and_names_go_before_classes() -> None:
    tensors = {**LLAMA, "model.layers.1.q_proj.weight": ("F32", (64, 64))}
    choice = chosen(tensors, quantize={"scheme": "W4A16", "group_size": 64})
    source = {"model_type": "llama", "torch_dtype": "float32"}
    config = config_of(choice, source)
    assert config["model_type"] == "llama"
    assert config["torch_dtype"] == "float32"
    assert source == {"model_type": "llama", "torch_dtype": "float32"}
    told = config["quantization_config"]
    groups = [(one["targets"], one["weights"]["group_size"]) for one in told["config_groups"].values()]
    assert groups == [(["Linear"], 64), ([DOWN], 48)]
    assert (told["format"], told["quant_method"]) == (PACK, "compressed-tensors")
    assert {EMBED, GATE, HEAD} <= set(told["ignore"])
    assert not {Q, DOWN} & set(told["ignore"])
    assert len(told["ignore"]) == len(set(told["ignore"]))


def test_how_a_scale_was_found_makes_no_group() -> None:
    choice = chosen(
        LLAMA,
        prune={"method": "magnitude_n_m", "pattern": "2:4", "targets": (Q,)},
        quantize={"scheme": "W8A16", "method": "smallest_error", "targets": ("Linear", "Embedding")},
    )
    told = config_of(choice, None)["quantization_config"]
    (group,) = told["config_groups"].values()
    assert group["targets"] == ["Embedding", "Linear"]
    assert not {Q, DOWN, EMBED, GATE, HEAD} & set(told["ignore"])


def test_a_tied_head_is_ignored_though_it_has_no_tensor() -> None:
    tied = {name: value for name, value in LLAMA.items() if not name.startswith("lm_head")}
    choice = chosen(tied, quantize={"scheme": "W8A16"})
    assert "lm_head" in config_of(choice, {})["quantization_config"]["ignore"]


@pytest.mark.parametrize(("scheme", "dtype"), [("BF16", "bfloat16"), ("FP16", "float16")])
def test_a_cast_is_told_as_the_dtype(scheme: str, dtype: str) -> None:
    choice = chosen(LLAMA, quantize={"scheme": scheme})
    assert config_of(choice, {"torch_dtype": "float32", "x": 1}) == {"torch_dtype": dtype, "x": 1}
    assert config_of(choice, {"dtype": "float32"}) == {"dtype": dtype}
    assert config_of(choice, {"x": 1}) == {"x": 1}
    assert config_of(choice, None) == {}


def test_zeroes_are_no_affair_of_the_config() -> None:
    choice = chosen(LLAMA, prune={"method": "magnitude_n_m", "pattern": "2:4"})
    assert config_of(choice, {"torch_dtype": "float32"}) == {"torch_dtype": "float32"}
