"""Candidates whose deletions, zeros and bits one solver chose together, and what they tell of its prices."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fleetpress.compression.allocation import Option
from fleetpress.compression.errors import MethodError
from fleetpress.compression.joint_allocation import Deletion, LayerChoice, Part, allocate_jointly

from .choices import CALIBRATION, STRUCTURES, Prices, Searched, Sensed, Table, tuned
from .effort import GROWTH
from .fitting import Tried, factors, telling

KINDS = ("codes", "zeros", "deletion")
_PRUNER = "fisher"
_METHOD_FOR_ZEROS = "smallest_error"  # zeros that grow during training leave nothing of codes found before it
_DIGITS = 4  # of shares of zeros
_OUTDATED = 0.7
_LEAST = 0.05  # of a price, over the common ratio: nothing is free
_LEAST_SHARE = 0.002  # of the float bytes that a place is looked for in,
_PLACED = 1 / 30  # and how near, as a logarithm


def joint_recipe(budget: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """The steps of the best choice within so many bytes of weights; None if there is none."""
    found = _chosen(budget, table, prices)
    if found is None:
        return None
    options, shares = found
    layers = {
        one.layer: {**one.settings, **({"method": _METHOD_FOR_ZEROS} if one.zeros else {})}
        for one in options
        if one.settings is not None
    }
    zeros = {one.layer: {"sparsity": round(one.zeros, _DIGITS)} for one in options if one.zeros}
    if not layers:
        return None
    deleted = {name: {"sparsity": share} for name, share in shares.items() if share}
    if deleted:
        layers, zeros = (
            {name: own for name, own in some.items() if name not in table.idle} for some in (layers, zeros)
        )
    steps: dict[str, Any] = {}
    growing = {"scope": "layer", **GROWTH, "layers": zeros}
    if deleted:
        steps["collect"] = {"batch_size": searched.batch_size}
        steps["prune"] = {
            "method": _PRUNER,
            "layers": deleted,
            "structure": list(STRUCTURES),
            "compensate": "least_squares",
        }
        if zeros:
            steps["prune"]["zeros"] = growing
        steps["calibrate"] = dict(CALIBRATION)
    elif zeros:
        steps["prune"] = {
            "method": "magnitude_unstructured",
            "schedule": "gradual",
            **growing,
            "targets": sorted(zeros),
        }
    starts_from_codes = not layers.keys() <= zeros.keys()
    if starts_from_codes:
        steps["calibrate"] = dict(CALIBRATION)
    steps["finetune"] = {**tuned(searched), "quantization_aware": True}
    steps["quantize"] = {
        "num_bits": 8,
        "method": searched.method if starts_from_codes else _METHOD_FOR_ZEROS,
        "biases": "FP8",
        "layers": layers,
        "targets": sorted(layers),
    }
    return steps


def expected_of(recipe: Mapping[str, Any], table: Table) -> dict[str, float]:
    """By how much a fine-tuned candidate was expected to raise the loss, without corrections, by kind of change.

    Empty for one whose zeros were not chosen layer by layer: what it does to each is not known.
    """
    prune, quantize = recipe.get("prune", {}), recipe["quantize"]
    deletes = "structure" in prune
    grown = prune.get("zeros", {}) if deletes else prune
    if "sparsity" in grown:
        return {}
    zeros = {name: own["sparsity"] for name, own in grown.get("layers", {}).items()}
    shares: dict[str, float] = {}
    if deletes:
        own = {name: one["sparsity"] for name, one in prune.get("layers", {}).items()}
        shares = {name: own.get(name, prune.get("sparsity", 0.0)) for name in table.deletions}
    found = dict.fromkeys(KINDS, 0.0)
    everywhere = {key: quantize[key] for key in ("num_bits", "group_size") if key in quantize}
    for name, options in table.layers.items():
        settings = quantize["layers"].get(name) if "layers" in quantize else everywhere
        if settings is not None:
            settings = {key: value for key, value in settings.items() if key != "method"}
        left = LayerChoice(options=(), parts=table.parts.get(name, (Part(weight=1.0),))).left(shares)
        for one in options:
            if one.settings == settings and round(one.zeros, _DIGITS) == zeros.get(name, 0.0):
                found["codes"] += left * (one.increase - one.by_zeros)
                found["zeros"] += left * one.by_zeros
                break
    for name, share in shares.items():
        known = table.deletions[name]
        found["deletion"] += float(
            np.interp(share, [one.share for one in known], [one.increase for one in known])
        )
    return found


def is_outdated(
    recipe: Mapping[str, Any], budget: float, table: Table, searched: Searched, prices: Prices
) -> bool:
    """Whether a candidate was chosen at prices that are now known to be wrong: within as many bytes the solver now
    expects to lose a third less than that one at the same prices.
    """
    now = joint_recipe(budget, table, searched, prices)
    return now is not None and _total(now, table, prices) < _OUTDATED * _total(recipe, table, prices)


def place_of(
    loss: float, near: Mapping[str, Any], table: Table, searched: Searched, prices: Prices
) -> float | None:
    """The share of the float bytes at which a candidate is expected to lose `loss` times what `near` does.

    By bisection to a thirtieth of a factor of e; None if nothing was expected of `near`.
    """
    wanted = loss * _total(near, table, prices)
    if not expected_of(near, table) or not wanted > 0:
        return None
    low, high = (math.log(share) for share in (_LEAST_SHARE, 1.0))
    while high - low > _PLACED:
        middle = (low + high) / 2
        found = joint_recipe(math.exp(middle) * table.float_bytes, table, searched, prices)
        if found is None or _total(found, table, prices) > wanted:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _total(recipe: Mapping[str, Any], table: Table, prices: Prices) -> float:
    factors = vars(prices)
    found = sum(factors[kind] * value for kind, value in expected_of(recipe, table).items())
    return float(found) + prices.training


def corrected(tried: Tried) -> Prices:
    """Factors for the three kinds from candidates that were measured, none below a twentieth of what they have in
    common.

    A constant is fitted beside them: training moves outputs even where nothing else was done, and that is no price of
    bits.
    """
    told = telling([({kind: one[kind] for kind in KINDS}, measured) for one, measured in tried])
    if told is None:
        return Prices()
    ratio, least = float(told.measured.sum() / told.expected.sum()), float(told.measured.min())
    *found, training = factors(told, ratio, constant=least)
    codes, zeros, deletion = (ratio * max(_LEAST, float(one)) for one in found)
    return Prices(codes=codes, zeros=zeros, deletion=deletion, training=least * float(training))


def _chosen(budget: float, table: Table, prices: Prices) -> tuple[list[Sensed], dict[str, float]] | None:
    names, options = list(table.layers), table.layers
    groups = {
        name: [Deletion(share=one.share, increase=prices.deletion * one.increase) for one in some]
        for name, some in table.deletions.items()
    }
    choices = [
        LayerChoice(
            options=[
                Option(
                    cost=one.bytes,
                    increase=prices.codes * (one.increase - one.by_zeros) + prices.zeros * one.by_zeros,
                )
                for one in options[name]
            ],
            parts=table.parts.get(name, (Part(weight=1.0),)),
        )
        for name in names
    ]
    try:
        found = allocate_jointly(choices, groups, budget)
    except MethodError:
        return None
    shares = {name: groups[name][index].share for name, index in found.deletions.items()}
    return [options[name][index] for name, index in zip(names, found.options, strict=True)], shares
