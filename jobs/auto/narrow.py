"""Candidates with few operations: the share deleted of every group of units, chosen by one solver. Pure.

Bits and zeros save no operations; weights are rounded to 8 bits a channel, which costs next to nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fleetpress.compression.allocation import Option
from fleetpress.compression.errors import MethodError
from fleetpress.compression.joint_allocation import Deletion, LayerChoice, allocate_jointly

from .choices import CALIBRATION, STRUCTURES, Prices, Searched, Table, tuned
from .fitting import Tried, factors, telling

ROUNDED: Mapping[str, Any] = {"num_bits": 8, "strategy": "channel"}
_PRUNER = "fisher"
_LEAST = 0.2  # of a price, over the common ratio
_OUTDATED = 0.8


def narrow_recipe(budget: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """The steps of the best deletions that leave so many multiply-accumulates; None if there are none."""
    shares = _chosen(budget, table, prices)
    deleted = {name: {"sparsity": share} for name, share in (shares or {}).items() if share}
    if not deleted:
        return None
    steps: dict[str, Any] = {
        "collect": {"batch_size": searched.batch_size},
        "prune": {
            "method": _PRUNER,
            "layers": deleted,
            "structure": list(STRUCTURES),
            "compensate": "least_squares",
        },
    }
    if searched.epochs:
        steps["finetune"] = tuned(searched)
    return {**steps, "calibrate": dict(CALIBRATION), "quantize": {**ROUNDED, "method": searched.method}}


def expected_by_group(recipe: Mapping[str, Any], table: Table) -> dict[str, float]:
    """By how much a candidate was expected to raise the loss, without corrections, for each group of units.

    Empty for one whose deletions were not chosen group by group.
    """
    own = recipe.get("prune", {}).get("layers")
    if own is None:
        return {}
    return {
        name: float(
            np.interp(
                own.get(name, {}).get("sparsity", 0.0),
                [one.share for one in known],
                [one.increase for one in known],
            )
        )
        for name, known in table.narrowings.items()
    }


def corrected_by_group(tried: Tried) -> Prices:
    """A factor for every group of units from candidates that were measured, none below a fifth of what they have in
    common.
    """
    told = telling(tried)
    if told is None:
        return Prices()
    ratio = math.exp(float(np.log(told.measured / told.expected.sum(1)).mean()))
    found = zip(told.names, factors(told, ratio), strict=True)
    return Prices(deletion=ratio, groups={name: max(_LEAST, float(one)) for name, one in found})


def is_narrow_outdated(
    recipe: Mapping[str, Any], budget: float, table: Table, searched: Searched, prices: Prices
) -> bool:
    """Whether a candidate was chosen at prices that are now known to be wrong: with as few operations the solver now
    expects to lose a fifth less than that one at the same prices.
    """
    now = narrow_recipe(budget, table, searched, prices)
    return now is not None and _total(now, table, prices) < _OUTDATED * _total(recipe, table, prices)


def _total(recipe: Mapping[str, Any], table: Table, prices: Prices) -> float:
    return sum(prices.groups.get(name, 1.0) * one for name, one in expected_by_group(recipe, table).items())


def _chosen(budget: float, table: Table, prices: Prices) -> dict[str, float] | None:
    groups = {
        name: [
            Deletion(share=one.share, increase=prices.groups.get(name, 1.0) * one.increase) for one in some
        ]
        for name, some in table.narrowings.items()
    }
    choices = [
        LayerChoice(options=[Option(cost=one.macs, increase=0.0)], parts=one.parts)
        for one in table.operations
    ]
    try:
        found = allocate_jointly(choices, groups, budget)
    except MethodError:
        return None
    return {name: groups[name][index].share for name, index in found.deletions.items()}
