"""One option for every layer, so that the loss grows least within a budget: a multiple-choice knapsack, exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from fleetpress.compression.errors import MethodError

_GAP = 1e-6  # relative, of the best possible increase: beyond what the estimates are worth
_SLACK = 4e-6  # the solver may pass a bound by a millionth


@dataclass(frozen=True, kw_only=True)
class Option:
    """What can be done to a layer: `cost` (bytes, operations ...) and by how much the loss is expected to grow."""

    cost: float
    increase: float


def allocate(layers: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The index of one option a layer, with the least total increase whose total cost is at most `budget`.

    Solved as an integer program (HiGHS, through SciPy), to a relative gap of 1e-6. Raises MethodError when even the
    cheapest options cost more than the budget.
    """
    if not layers:
        return []
    least = sum(min(option.cost for option in options) for options in layers)
    if least > budget:
        raise MethodError(f"the cheapest options cost {least:g}, more than the budget {budget:g}; raise it")
    kept = [undominated(options) for options in layers]
    chosen = _solved(layers, kept, budget)
    if sum(layers[layer][index].cost for layer, index in enumerate(chosen)) > budget:
        chosen = _solved(layers, kept, budget * (1 - _SLACK))
    return chosen


def _solved(layers: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], budget: float) -> list[int]:
    cost = np.array([layers[layer][index].cost for layer, indices in enumerate(kept) for index in indices])
    increase = np.array(
        [layers[layer][index].increase for layer, indices in enumerate(kept) for index in indices]
    )
    one_each = np.zeros((len(layers), len(cost)))
    start = 0
    for layer, indices in enumerate(kept):
        one_each[layer, start : start + len(indices)] = 1
        start += len(indices)
    found = least_increase(increase, cost, budget, LinearConstraint(one_each, 1, 1), {"mip_rel_gap": _GAP})
    if found is None:  # the budget is so near the least possible cost that nothing else fits
        return [indices[0] for indices in kept]
    chosen, start = [], 0
    for indices in kept:
        share = found[start : start + len(indices)]
        chosen.append(indices[int(np.argmax(share))])
        start += len(indices)
    return chosen


def least_increase(
    increase: NDArray[np.float64],
    cost: NDArray[np.float64],
    budget: float,
    equations: LinearConstraint,
    options: Mapping[str, float],
) -> NDArray[np.float64] | None:
    """The 0-1 variables [n] of least total `increase` that meet the `equations` and cost at most `budget`.

    None if the solver, which takes the `options`, finds none.
    """
    found = milp(
        increase / max(float(increase.max()), 1e-300),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[equations, LinearConstraint(cost[None, :] / max(budget, 1e-300), -np.inf, 1)],
        options=dict(options),
    )
    values: NDArray[np.float64] | None = found.x
    return values


def undominated(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other is at least as good as in both ways, cheapest first."""
    order = sorted(
        range(len(options)), key=lambda index: (options[index].cost, options[index].increase, index)
    )
    kept: list[int] = []
    for index in order:
        if not kept or options[index].increase < options[kept[-1]].increase:
            kept.append(index)
    return kept
