"""Layers of a bare checkpoint, told from names and shapes alone: no module class, no weights read."""

import re
from collections.abc import Mapping

from fleetpress.compression.layers import Layer, Selection, select

_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|shared|relative_attention_bias)([._]|$)")
# What quantizers of language models leave alone unless asked: the head, and what decides between experts.
KEPT = (r"(.*\.)?lm_head", r"(.*\.)?(router|gate|score|classifier)")
# Output layers of transformers' language models that checkpoints hold under another name (tied or renamed).
HEADS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder", "vocab_projector")


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
