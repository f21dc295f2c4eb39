"""Labels on the dims of tensors, and which of them must be deleted together.

Every index of a dim that could be deleted carries an atom (an integer). Operators unite atoms ("these go together") or
pin them ("these must stay"); the classes of united atoms without a pinned one are what can be deleted. Unions are only
recorded while the graph is read and resolved once at the end, as arrays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import fx

from fleetpress.compression.pruning.structure import Reading

Atoms: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Axis: TypeAlias = Atoms | None  # one dim: an atom for every index, or None where nothing can be deleted
Labels: TypeAlias = tuple[Axis, ...]  # one tensor
Value: TypeAlias = Labels | list[Labels] | None  # what a node gives: a tensor, several, or no tensor at all


class Labelling:
    """What the operators read so far have said about the atoms.

    `turns` says for a node that splits a dim how many of its ways to do so were found useless in earlier readings.
    """

    def __init__(self, turns: Mapping[str, int], reading: Reading) -> None:
        self.reading = reading
        self.values: dict[str, Value] = {}
        self.splits: list[Split] = []
        self._turns = turns
        self._atoms = 0
        self._left: list[Atoms] = []
        self._right: list[Atoms] = []
        self._pinned: list[Atoms] = []
        self._reasons: list[str] = []
        self._marked: dict[str, list[Atoms]] = {}

    def fresh(self, size: int) -> Atoms:
        """New atoms for a dim of this size."""
        self._atoms += size
        return np.arange(self._atoms - size, self._atoms, dtype=np.int64)

    def of(self, item: object) -> Labels:
        """Labels of a node that gives one tensor; anything else (a number, None) has no dims."""
        value = self.values.get(item.name) if isinstance(item, fx.Node) else None
        return value if isinstance(value, tuple) else ()

    def pin(self, axis: Axis, node: fx.Node, why: str) -> None:
        """Nothing along this dim may be deleted, because of what `node` does."""
        if axis is not None:
            self._pinned.append(axis)
            self._reasons.append(f"{node.name}: {why}")

    def mark(self, axis: Axis, kind: str) -> None:
        """What is deleted along this dim are units of this structure."""
        if axis is not None:
            self._marked.setdefault(kind, []).append(axis)

    def unite(self, one: Axis, other: Axis, node: fx.Node) -> Axis:
        """The same index of both goes or stays; a dim that cannot shrink holds back the other one."""
        if one is None or other is None:
            self.pin(
                one if other is None else other,
                node,
                "meets what cannot shrink, such as an input",
            )
            return None
        if one is not other:
            self._left.append(one)
            self._right.append(other)
        return one

    def unite_rows(self, rows: Atoms) -> Atoms:
        """All of a row goes or stays; gives the row's label."""
        first = rows[:, 0]
        self._left.append(np.repeat(first, rows.shape[1] - 1))
        self._right.append(rows[:, 1:].reshape(-1))
        return first

    def split(self, node: fx.Node, block: Atoms, candidates: list[int]) -> tuple[int, Atoms]:
        """Which dim of a block shall carry the labels when they vary along several, and its labels."""
        turn = self._turns.get(node.name, 0)
        chosen = candidates[min(turn, len(candidates) - 1)]
        rows = np.moveaxis(block, chosen, 0).reshape(block.shape[chosen], -1)
        axis = self.unite_rows(rows)
        self.splits.append(Split(node=node.name, axis=axis, more=turn + 1 < len(candidates)))
        return chosen, axis

    def resolve(self) -> "Coupling":
        """The classes of united atoms."""
        left = np.concatenate([np.empty(0, np.int64), *self._left])
        right = np.concatenate([np.empty(0, np.int64), *self._right])
        roots = components(self._atoms, left, right)
        first_pin = np.full(self._atoms, len(self._reasons), dtype=np.int64)
        for index, axis in enumerate(self._pinned):
            np.minimum.at(first_pin, roots[axis], index)
        marked = {}
        for kind, axes in self._marked.items():
            mask = np.zeros(self._atoms, dtype=np.bool_)
            mask[roots[np.concatenate(axes)]] = True
            marked[kind] = mask[roots]
        return Coupling(
            reading=self.reading,
            values=self.values,
            roots=roots,
            first_pin=first_pin[roots],
            reasons=tuple(self._reasons),
            marked=marked,
            stored={},
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """A dim that was taken apart: the labels it kept, and whether there are more ways to do it."""

    node: str
    axis: Atoms
    more: bool


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """What goes together in a program: `roots[atom]` names the atom's class, `stored` labels the stored tensors.

    `marked[structure][atom]` tells units that are more than channels.
    """

    reading: Reading
    values: Mapping[str, Value]
    roots: Atoms
    first_pin: Atoms
    reasons: tuple[str, ...]
    marked: Mapping[str, Mask]
    stored: Mapping[str, Labels] = field(default_factory=dict)

    def classes(self, axis: Atoms) -> Atoms:
        """The class of every index."""
        return self.roots[axis]

    def free(self, axis: Atoms) -> Mask:
        """Which indices could be deleted."""
        return np.equal(self.first_pin[axis], len(self.reasons))

    def kinds(self, axis: Atoms) -> list[str]:
        """The structure that every index belongs to; what is marked twice is what is rarer of both."""
        found = ["channel"] * len(axis)
        for kind in ("head_dim", "head", "normalized", "recurrent"):
            for place in np.flatnonzero(self.marked[kind][axis]) if kind in self.marked else ():
                found[place] = kind
        return found

    def among(self, classes: Atoms) -> Mask:
        """For every atom whether its class is one of these."""
        chosen = np.zeros(len(self.roots), dtype=np.bool_)
        chosen[classes] = True
        return chosen[self.roots]

    def reason(self, atom: int) -> str:
        """Why a pinned atom must stay."""
        return self.reasons[int(self.first_pin[atom])]

    def axes(self) -> list[Atoms]:
        """Every labelled dim of the program, each once."""
        seen: dict[int, Atoms] = {}
        for value in [*self.values.values(), *self.stored.values()]:
            for labels in value if isinstance(value, list) else [value]:
                for axis in labels or ():
                    if axis is not None:
                        seen[id(axis)] = axis
        return list(seen.values())


def components(count: int, left: Atoms, right: Atoms) -> Atoms:
    """The smallest atom of every atom's connected component, by hooking roots and halving paths."""
    roots = np.arange(count, dtype=np.int64)
    while True:
        one, other = roots[left], roots[right]
        apart = one != other
        if not apart.any():
            return roots
        left, right, one, other = left[apart], right[apart], one[apart], other[apart]
        np.minimum.at(roots, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(above := roots[roots], roots):
            roots = above


Rule: TypeAlias = Callable[[Labelling, fx.Node], Value]
