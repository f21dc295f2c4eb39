"""Layers by name and kind, and the choice that `targets` and `ignore` make among them."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fleetpress.compression.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights that one or more operators use: `weights` and `biases` are state names, `axis` the weights' unit axis.

    `name` is the weight's state name without `.weight`; a recurrent layer is named by its module.
    """

    name: str
    kind: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    axis: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Layers that a step works on, and the `ignore` entries that matched nothing (a warning, not an error)."""

    layers: tuple[Layer, ...]
    unused_ignores: tuple[str, ...]


def select(
    candidates: Sequence[Layer], targets: Iterable[str], ignore: Iterable[str], *, kinds: Sequence[str]
) -> Selection:
    """Layers that `targets` name and `ignore` does not; without targets those of the given `kinds`.

    An entry is a layer's name, a kind, or `re:` and a pattern that the whole name matches.
    Raises TargetError for a target that matches no layer, with the nearest name.
    """
    targets, ignore = tuple(targets), tuple(ignore)
    for target in targets:
        if not any(matches(layer, target) for layer in candidates):
            words = [*(layer.name for layer in candidates), *{layer.kind for layer in candidates}]
            near = difflib.get_close_matches(target, words, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the layers are {', '.join(words) or 'none'}"
            raise TargetError(f"target {target!r} matches no layer; {hint}")
    wanted = [
        layer
        for layer in candidates
        if (any(matches(layer, target) for target in targets) if targets else layer.kind in kinds)
    ]
    unused = tuple(entry for entry in ignore if not any(matches(layer, entry) for layer in candidates))
    return Selection(
        layers=tuple(layer for layer in wanted if not any(matches(layer, entry) for entry in ignore)),
        unused_ignores=unused,
    )


def check_names(candidates: Sequence[Layer], names: Iterable[str]) -> None:
    """Raise TargetError for a name that is no layer's, with the nearest one."""
    known = [layer.name for layer in candidates]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the layers are {', '.join(known) or 'none'}"
            raise TargetError(f"layers names {name!r}, which is no layer here; {hint}")


def matches(layer: Layer, entry: str) -> bool:
    """Whether a `targets` or `ignore` entry means this layer."""
    if entry.startswith("re:"):
        return re.fullmatch(entry[3:], layer.name) is not None
    return entry in (layer.name, layer.kind)
