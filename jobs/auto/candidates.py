"""Recipes that a search may try, as families of one number each: how much of the model is left. Pure.

A family is a way to compress; its number x, from 1 (nothing done) towards 0, orders its recipes from harmless to
drastic. So a search in one dimension a family is enough: where a recipe was good, smaller ones are worth a trial.
"""

from typing import Any, Literal

from fleetpress.compression.allocation import Option, allocate

from .choices import CALIBRATION, STRUCTURES, UNCORRECTED, Prices, Searched, Table, tuned
from .joint import joint_recipe
from .narrow import ROUNDED, narrow_recipe

Family = Literal["quantize", "delete", "zero", "joint", "narrow"]
_LEAST_SHARE = 0.02
_BITS_OF_KEPT = 8  # that a weight which is not zero takes, with its place


def recipe_of(
    family: Family, x: float, table: Table, searched: Searched, prices: Prices = UNCORRECTED
) -> dict[str, Any] | None:
    """The steps of the family's recipe at x, or None if there is none so small."""
    return _FAMILIES[family](x, table, searched, prices)


def starts(searched: Searched, cost: str, share: float | None) -> dict[Family, tuple[float, ...]]:
    """Where the search begins in every family that changes the cost; `share` of it is what a budget leaves."""
    found: dict[Family, tuple[float, ...]] = {}
    if cost != "bytes":
        found["narrow"] = (0.5, 0.25, 0.12) if share is None else _parts(share, 1.0, 0.95, 0.88)
        found["delete"] = (0.3,) if share is None else _parts(share, 0.9)
    if cost == "bytes":
        # Shares of 32 bits: about 8, 5, 4 and 3 bits a weight with their scales.
        of_32 = 32 / searched.float_bits
        found["quantize"] = (
            _parts(of_32, 0.26, 0.17, 0.132, 0.1) if share is None else _parts(share, 0.95, 0.85, 0.7, 0.5)
        )
        if searched.epochs:
            if searched.grows:
                found["zero"] = _parts(of_32, 0.05, 0.025) if share is None else _parts(share, 0.9, 0.6)
            found["joint"] = _parts(of_32, 0.04, 0.02) if share is None else _parts(share, 0.9, 0.7)
            found["delete"] = (0.6, 0.4)
    return found


def last_resort(table: Table, method: str) -> dict[str, Any]:
    """8 bits in every layer, and nothing deleted: what is left to try when no candidate passes."""
    targets = {"targets": sorted(table.layers)} if table.layers else {}
    return {"calibrate": dict(CALIBRATION), "quantize": {**ROUNDED, "method": method, **targets}}


def _parts(share: float, *of: float) -> tuple[float, ...]:
    return tuple(part * share for part in of)


def _quantized(x: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """Bits and groups of every layer by the expected increase of the loss, within x of the float bytes."""
    budget = max(x * table.float_bytes, table.least_bytes)
    plain = table.plain
    names = list(plain)
    options = [[Option(cost=item.bytes, increase=item.increase) for item in plain[name]] for name in names]
    chosen = allocate(options, budget)
    layers: dict[str, Any] = {}
    for name, index in zip(names, chosen, strict=True):
        settings = plain[name][index].settings
        if settings is not None:
            layers[name] = dict(settings)
    if not layers:
        return None
    step = {"num_bits": 8, "method": searched.method, "layers": layers, "targets": sorted(layers)}
    return {"calibrate": dict(CALIBRATION), "quantize": step}


def _deleted(x: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """Units deleted until about x of the weights are left, fine-tuned, at 4 bits, or 8 where bytes do not count."""
    if not _LEAST_SHARE < x < 1:
        return None
    # A layer loses inputs and outputs, so its weights shrink with the square.
    sparsity = round(1 - x**0.5, 4)
    bits = ROUNDED if table.operations else {"num_bits": 4, "group_size": 64}
    steps: dict[str, Any] = {
        "collect": {"batch_size": searched.batch_size},
        "prune": {
            "method": "gradient_stability",
            "sparsity": sparsity,
            "structure": list(STRUCTURES),
            "compensate": "least_squares",
        },
    }
    if searched.epochs:
        steps["finetune"] = tuned(searched)
    return {
        **steps,
        "calibrate": dict(CALIBRATION),
        "quantize": {**bits, "method": searched.method},
    }


def _zeroed(x: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """Weights made zero while the others are trained for 3-bit codes; places and codes take about x of the bytes."""
    sparsity = round(1 - x * searched.float_bits / _BITS_OF_KEPT, 4)
    if not 0.3 < sparsity < 1:
        return None
    method = "magnitude_unstructured"
    return {
        "prune": {"method": method, "sparsity": sparsity, "scope": "global", "schedule": "gradual"},
        "finetune": {**tuned(searched), "quantization_aware": True},
        "quantize": {"num_bits": 3, "strategy": "tensor", "method": "smallest_error", "biases": "FP8"},
    }


def _joint(x: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """Deleted units, zeros and bits of every layer, chosen together within x of the float bytes, and fine-tuned."""
    return joint_recipe(x * table.float_bytes, table, searched, prices)


def _narrow(x: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """Units deleted of every group until x of the multiply-accumulates are left, fine-tuned, at 8 bits."""
    return narrow_recipe(x * table.macs, table, searched, prices) if 0 < x < 1 else None


_FAMILIES = {
    "quantize": _quantized,
    "delete": _deleted,
    "zero": _zeroed,
    "joint": _joint,
    "narrow": _narrow,
}
