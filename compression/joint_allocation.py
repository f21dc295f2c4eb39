"""Options of all layers and shares of units to delete, chosen together: one integer program.

What a layer costs depends on three choices: its own option (bits, zeros), how many of the units that it reads are
left, and how many of those that it writes. The product is linear over the triples, so one binary variable for each
triple of a layer, tied to the shares that coupled layers have in common, makes the whole choice an integer linear
program (the lifting of products of 0-1 variables: Sherali & Adams 1990, SIAM J. Discrete Math. 3, 411-430).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import coo_array

from fleetpress.compression.allocation import Option, allocate, least_increase, undominated
from fleetpress.compression.errors import MethodError

_GAP = 1e-4  # relative, of the best possible increase
_NODES = 4000  # of the solver's tree: a bound that is the same on every machine
_SLACK = 4e-6  # the solver may pass a bound by a millionth
_MOST_GROUPS = 2  # of one layer that are chosen together with its option


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """Deleting this `share` (0 to below 1) of a group's units, and by how much the loss is expected to grow."""

    share: float
    increase: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """A share of a layer's cost (`weight`), and what of it goes with which groups: (group, share of an axis that holds
    units of the group), once for each axis.
    """

    weight: float
    axes: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """A layer's `options` while all units are there, and its `parts`, whose weights add up to 1."""

    options: Sequence[Option]
    parts: Sequence[Part] = (Part(weight=1.0),)

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups whose units the layer holds, in the order of its parts."""
        return tuple(dict.fromkeys(group for part in self.parts for group, _ in part.axes))

    def left(self, shares: Mapping[str, float]) -> float:
        """The share of the layer that is left without these shares of the groups' units."""
        return sum(
            part.weight * math.prod(1 - within * shares.get(group, 0.0) for group, within in part.axes)
            for part in self.parts
        )


@dataclass(frozen=True, kw_only=True)
class JointChoice:
    """The index of an option for every layer, of a deletion for every group; their cost and expected increase."""

    options: tuple[int, ...]
    deletions: Mapping[str, int]
    cost: float
    increase: float


def allocate_jointly(
    layers: Sequence[LayerChoice], groups: Mapping[str, Sequence[Deletion]], budget: float
) -> JointChoice:
    """The least total increase of the loss whose total cost is at most `budget`.

    A layer's cost and increase shrink with what is left of it. Solved by HiGHS (through SciPy) to a relative gap of
    1e-4, or up to a fixed number of nodes; then the options are chosen once more, exactly, for the shares that were
    found. A layer with more than two groups is taken, while shares are chosen, to keep all units of the others.
    Raises MethodError when even the cheapest choice costs more than the budget.
    """
    most = {name: max(range(len(some)), key=lambda index: some[index].share) for name, some in groups.items()}
    if (least := _least_cost(layers, groups, most)) > budget:
        raise MethodError(f"the cheapest choice costs {least:g}, more than the budget {budget:g}; raise it")
    deletions = _deletions(layers, groups, budget, most)
    shares = {name: groups[name][index].share for name, index in deletions.items()}
    left = [layer.left(shares) for layer in layers]
    options = [
        [Option(cost=kept * option.cost, increase=kept * option.increase) for option in layer.options]
        for layer, kept in zip(layers, left, strict=True)
    ]
    chosen = allocate(options, budget)
    return JointChoice(
        options=tuple(chosen),
        deletions=deletions,
        cost=sum(some[index].cost for some, index in zip(options, chosen, strict=True)),
        increase=sum(some[index].increase for some, index in zip(options, chosen, strict=True))
        + sum(groups[name][index].increase for name, index in deletions.items()),
    )


def _deletions(
    layers: Sequence[LayerChoice],
    groups: Mapping[str, Sequence[Deletion]],
    budget: float,
    most: Mapping[str, int],
) -> Mapping[str, int]:
    """Which deletion of every group the best joint choice takes; `most` are those that take most."""
    if not groups:
        return {}
    program = _Program(layers, groups)
    for limit in (budget, budget * (1 - _SLACK)):
        found = program.solved(limit)
        if found is not None and _least_cost(layers, groups, found) <= budget:
            return found
    return most  # so near the cheapest choice that nothing else was found


def _least_cost(
    layers: Sequence[LayerChoice], groups: Mapping[str, Sequence[Deletion]], deletions: Mapping[str, int]
) -> float:
    """What all layers cost with their cheapest options after these deletions."""
    shares = {name: groups[name][index].share for name, index in deletions.items()}
    return sum(layer.left(shares) * min(option.cost for option in layer.options) for layer in layers)


class _Program:
    """The integer program: variables of groups (group, deletion), then those of layers (layer, option, deletions)."""

    def __init__(self, layers: Sequence[LayerChoice], groups: Mapping[str, Sequence[Deletion]]) -> None:
        self._groups = groups
        self._place = {}  # where a group's variables begin
        self._cost: list[float] = []
        self._increase: list[float] = []
        # Of equations: variables, factors, right side.
        self._rows: list[tuple[list[int], list[float], float]] = []
        for name, some in groups.items():
            self._place[name] = len(self._cost)
            self._cost += [0.0] * len(some)
            self._increase += [one.increase for one in some]
            self._equate([(self._place[name] + index, 1.0) for index in range(len(some))], 1.0)
        for layer in layers:
            self._add(layer)

    def _add(self, layer: LayerChoice) -> None:
        names = [name for name in layer.groups if name in self._groups][:_MOST_GROUPS]
        combinations = list(itertools.product(*(range(len(self._groups[name])) for name in names)))
        start = len(self._cost)
        members: dict[tuple[str, int], list[int]] = {}
        for places in combinations:
            left = layer.left(
                {name: self._groups[name][at].share for name, at in zip(names, places, strict=True)}
            )
            for index in undominated(layer.options):
                for name, at in zip(names, places, strict=True):
                    members.setdefault((name, at), []).append(len(self._cost))
                self._cost.append(left * layer.options[index].cost)
                self._increase.append(left * layer.options[index].increase)
        if not names:
            self._equate([(at, 1.0) for at in range(start, len(self._cost))], 1.0)
        for (name, at), variables in members.items():
            self._equate([*((one, 1.0) for one in variables), (self._place[name] + at, -1.0)], 0.0)

    def _equate(self, terms: list[tuple[int, float]], right: float) -> None:
        self._rows.append(([at for at, _ in terms], [factor for _, factor in terms], right))

    def solved(self, budget: float) -> dict[str, int] | None:
        """The deletion of every group, None if the solver found none."""
        cost, increase = np.array(self._cost), np.array(self._increase)
        rows = [index for index, (variables, _, _) in enumerate(self._rows) for _ in variables]
        columns = [at for variables, _, _ in self._rows for at in variables]
        factors = [factor for _, some, _ in self._rows for factor in some]
        equations = coo_array((factors, (rows, columns)), shape=(len(self._rows), len(cost))).tocsc()
        right = np.array([one for _, _, one in self._rows])
        limits = {"mip_rel_gap": _GAP, "node_limit": _NODES}
        found = least_increase(increase, cost, budget, LinearConstraint(equations, right, right), limits)
        if found is None:
            return None
        return {
            name: int(np.argmax(found[self._place[name] : self._place[name] + len(some)]))
            for name, some in self._groups.items()
        }
