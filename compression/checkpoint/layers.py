"""Layers of a bare checkpoint, told from names and shapes alone: no module class, no weights read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetpress.compression.selection import Layer, Selection, select

# `shared` is T5's; `shared_expert` is none.
_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|relative_attention_bias)([._]|$)|(^|\.)shared$")
# What quantizers of language models leave alone unless asked: the head, and what decides between experts.
# Some of the latter are a module within one: `router.layer` (Granite), `gate.wg` (Hunyuan).
KEPT = (r"(.*\.)?lm_head", r"(.*\.)?(router|gate|shared_expert_gate|score|classifier)(\.(layer|wg))?")
# Output layers of transformers' language models that checkpoints hold under another name (tied or renamed).
HEADS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder", "vocab_projector")

_EXPERTS = re.compile(r"(.*\.)?experts\.(gate_up_proj|down_proj)")
# Their experts are [experts, inputs, outputs]; what reads them knows no other form.
_TRANSPOSED_EXPERTS = {"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"}


@dataclass(frozen=True, kw_only=True)
class ExpertMatrix:
    """One expert's matrix within a tensor of all: its name as a layer of its own, and the rows that it takes."""

    name: str
    first_row: int
    shape: tuple[int, int]


def expert_matrices(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> tuple[ExpertMatrix, ...]:
    """The matrices in a tensor `*.experts.gate_up_proj` or `*.experts.down_proj` [experts, outputs, inputs].

    They get the names that such a layer has where every expert stands for itself, which is what transformers and vLLM
    look for beside a quantization config: `experts.0.gate_proj.weight`. Nothing for tensors of another kind, or laid
    out otherwise as far as `config` (hidden_size, model_type) tells.
    """
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    hidden = inner.get("hidden_size")
    if (
        not holds_experts(name, shape)
        or not isinstance(hidden, int)
        or model_types(config) & _TRANSPOSED_EXPERTS
    ):
        return ()
    experts, outputs, inputs = shape
    prefix, _, kind = name.rpartition(".")
    if kind == "down_proj":
        projections: tuple[str, ...] = ("down_proj",) if outputs == hidden else ()
    else:
        projections = ("gate_proj", "up_proj") if inputs == hidden and outputs % 2 == 0 else ()
    rows = outputs // max(1, len(projections))
    return tuple(
        ExpertMatrix(
            name=f"{prefix}.{expert}.{projection}.weight",
            first_row=expert * outputs + index * rows,
            shape=(rows, inputs),
        )
        for expert in range(experts)
        for index, projection in enumerate(projections)
    )


def holds_experts(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weights of all experts of a layer."""
    return _EXPERTS.fullmatch(name) is not None and len(shape) == 3 and 0 not in shape


def model_types(config: Mapping[str, Any]) -> set[Any]:
    """What `config.json` calls the model, and its part for text."""
    text = config.get("text_config")
    return {part.get("model_type") for part in (config, text) if isinstance(part, Mapping)}


def checkpoint_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """Linear, Conv1D and Embedding layers: every matrix `*.weight` not empty, by its path and its bias.

    An Embedding's path says so. A Conv1D (the layer of GPT-2 and its kin in transformers) is a Linear stored as
    [inputs, output units]: its bias has one entry per column.
    """
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and 0 not in shape
    }
    transposed = {
        _leaf(path) for path, shape in matrices.items() if _is_transposed(shape, shapes.get(f"{path}.bias"))
    }
    found = []
    for path in matrices:
        kind = "Embedding" if _EMBEDDING.search(path) else "Conv1D" if _leaf(path) in transposed else "Linear"
        found.append(
            Layer(
                name=path,
                kind=kind,
                weights=(f"{path}.weight",),
                biases=(f"{path}.bias",) if f"{path}.bias" in shapes else (),
                axis=1 if kind == "Conv1D" else 0,
                nodes=(),
            )
        )
    return tuple(found)


def _leaf(path: str) -> str:
    """The layer's name within its block: a square Conv1D is told by those of the same name that are not square."""
    return path.rpartition(".")[2]


def _is_transposed(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> bool:
    return bias is not None and shape[0] != shape[1] and bias == (shape[1],)


def select_checkpoint(
    layers: tuple[Layer, ...], targets: tuple[str, ...], ignore: tuple[str, ...]
) -> Selection:
    """Like `layers.select`; without targets all Linear layers but the head and routers. Raises TargetError."""
    chosen = select(layers, targets, ignore, kinds=("Linear",))
    if targets:
        return chosen
    kept = {layer.name for entry in KEPT for layer in layers if re.fullmatch(entry, layer.name)}
    return Selection(
        layers=tuple(layer for layer in chosen.layers if layer.name not in kept),
        unused_ignores=chosen.unused_ignores,
    )
