"""Layers of a bare checkpoint, told from names and shapes alone: no module class, no weights read."""

import re
from collections.abc import Mapping

from fleetpress.compression.layers import Layer, Selection, select

_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|shared)([._]|$)")
# What quantizers of language models leave alone unless asked: the head, and what decides between experts.
KEPT = (r"(.*\.)?lm_head", r"(.*\.)?(router|gate|score|classifier)")
# Output layers that share the embedding's weight in transformers' language models; checkpoints hold it once.
TIED_HEADS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder", "vocab_projector")


def checkpoint_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """Linear and Embedding layers: every two-dimensional `*.weight`, by whether its path speaks of an embedding."""
    found = []
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) != 2:
            continue
        path = name.removesuffix(".weight")
        bias = f"{path}.bias"
        found.append(
            Layer(
                name=path,
                kind="Embedding" if _EMBEDDING.search(path) else "Linear",
                weights=(name,),
                biases=(bias,) if bias in shapes else (),
                axis=0,
                nodes=(),
            )
        )
    return tuple(found)


def select_checkpoint(
    layers: tuple[Layer, ...], targets: tuple[str, ...], ignore: tuple[str, ...]
) -> Selection:
    """Like `layers.select`; without targets all Linear layers but the head and routers. Raises TargetError."""
    chosen = select(layers, targets, ignore, kinds=("Linear",))
    if targets:
        return chosen
    kept = {
        layer.name for entry in KEPT for layer in layers if re.fullmatch(entry, layer.name)
    }
    return Selection(
        layers=tuple(layer for layer in chosen.layers if layer.name not in kept),
        unused_ignores=chosen.unused_ignores,
    )
