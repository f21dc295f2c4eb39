"""The blocks of a language model, told from the names of its checkpoint's tensors alone."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NUMBERED = re.compile(r"((?:[^.\d][^.]*\.)+)(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class NamedBlocks:
    """Tensors `<path><number>.<rest>`: `count` blocks, numbered from 0; `path` ends with a dot."""

    path: str
    count: int

    def index_of(self, name: str) -> int | None:
        """The block that a tensor, or a layer, is in; None for what is in none."""
        found = _NUMBERED.match(name)
        return int(found[2]) if found is not None and found[1] == self.path else None


def named_blocks(shapes: Mapping[str, Sequence[int]]) -> NamedBlocks | None:
    """The numbered list that holds most of the weights; None if there is none, or numbers are missing in it."""
    weights: dict[str, int] = {}
    numbers: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        found = _NUMBERED.match(name)
        if found is not None:
            weights[found[1]] = weights.get(found[1], 0) + math.prod(shape)
            numbers.setdefault(found[1], set()).add(int(found[2]))
    if not weights:
        return None
    path = max(weights, key=lambda one: weights[one])
    if numbers[path] != set(range(len(numbers[path]))):
        return None
    return NamedBlocks(path=path, count=len(numbers[path]))
