"""Recipes that a search may try, as families of one number each: how much of the model is left. Pure.

A family is a way to compress; its number x, from 1 (nothing done) towards 0, orders its recipes from harmless to
drastic. So a search in one dimension a family is enough: where a recipe was good, smaller ones are worth a trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fleetpress.compression.allocation import Option, allocate

Family = Literal["quantize", "delete", "zero"]
CALIBRATION = {"samples": 512, "batch_size": 32}
_LEAST_SHARE = 0.02
_STRUCTURES = ["channel", "head", "recurrent"]
_BITS_OF_KEPT = 8  # that a weight which is not zero takes, with its place


@dataclass(frozen=True, kw_only=True)
class Sensed:
    """What can be done to a layer: `settings` of its own in the `quantize` step (None: leave it), bytes, increase."""

    layer: str
    settings: Mapping[str, Any] | None
    bytes: int
    increase: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """Everything that was sensed of a program: options layer by layer, and the bytes of its float weights."""

    layers: Mapping[str, Sequence[Sensed]]

    @property
    def float_bytes(self) -> int:
        """Bytes of all these layers as they are."""
        return sum(max(option.bytes for option in options) for options in self.layers.values())

    @property
    def least_bytes(self) -> int:
        """Bytes of all these layers with the cheapest options."""
        return sum(min(option.bytes for option in options) for options in self.layers.values())


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What recipes are made of: `epochs` of fine-tuning (0: none) at the rate `lr`, the quantization method.

    `is_labelled` says that the data have targets, so that fine-tuning may be guided by the model itself beside them.
    """

    epochs: int
    method: str
    lr: float = 1e-3
    batch_size: int = 64
    is_labelled: bool = True


def recipe_of(family: Family, x: float, table: Table, searched: Searched) -> dict[str, Any] | None:
    """The steps of the family's recipe at x, or None if there is none so small."""
    return _FAMILIES[family](x, table, searched)


def starts(searched: Searched, cost: str, share: float | None) -> dict[Family, tuple[float, ...]]:
    """Where the search begins in every family that changes the cost; `share` of the bytes is what a budget leaves."""
    found: dict[Family, tuple[float, ...]] = {}
    if cost == "bytes":
        # Shares of 32 bits: about 8, 5, 4 and 3 bits a weight with their scales.
        found["quantize"] = (0.26, 0.17, 0.132, 0.1) if share is None else _parts(share, 0.95, 0.85, 0.7, 0.5)
    if searched.epochs and cost == "bytes":
        found["zero"] = (0.05, 0.025) if share is None else _parts(share, 0.9, 0.6)
    if searched.epochs or cost != "bytes":
        found["delete"] = (
            (0.6, 0.4) if share is None or cost == "bytes" else _parts(share, 0.95, 0.8, 1.1, 0.65)
        )
    return found


def _parts(share: float, *of: float) -> tuple[float, ...]:
    return tuple(part * share for part in of)


def _quantized(x: float, table: Table, searched: Searched) -> dict[str, Any] | None:
    """Bits and groups of every layer by the expected increase of the loss, within x of the float bytes."""
    budget = max(x * table.float_bytes, table.least_bytes)
    names = list(table.layers)
    options = [
        [Option(cost=item.bytes, increase=item.increase) for item in table.layers[name]] for name in names
    ]
    chosen = allocate(options, budget)
    layers: dict[str, Any] = {}
    for name, index in zip(names, chosen, strict=True):
        settings = table.layers[name][index].settings
        if settings is not None:
            layers[name] = dict(settings)
    if not layers:
        return None
    step = {"num_bits": 8, "method": searched.method, "layers": layers, "targets": sorted(layers)}
    return {"calibrate": dict(CALIBRATION), "quantize": step}


def _deleted(x: float, table: Table, searched: Searched) -> dict[str, Any] | None:
    """Units deleted until about x of the weights are left, fine-tuned, at 4 bits."""
    if not _LEAST_SHARE < x < 1:
        return None
    # A layer loses inputs and outputs, so its weights shrink with the square.
    sparsity = round(1 - x**0.5, 4)
    steps: dict[str, Any] = {
        "collect": {"batch_size": searched.batch_size},
        "prune": {
            "method": "gradient_stability",
            "sparsity": sparsity,
            "structure": _STRUCTURES,
            "compensate": "least_squares",
        },
    }
    if searched.epochs:
        steps["finetune"] = _tuned(searched)
    return {
        **steps,
        "calibrate": dict(CALIBRATION),
        "quantize": {"scheme": "W4A16", "group_size": 64, "method": searched.method},
    }


def _zeroed(x: float, table: Table, searched: Searched) -> dict[str, Any] | None:
    """Weights made zero while the others are trained for 3-bit codes; places and codes take about x of the bytes."""
    sparsity = round(1 - x * 32 / _BITS_OF_KEPT, 4)
    if not 0.3 < sparsity < 1:
        return None
    method = "magnitude_unstructured"
    return {
        "prune": {"method": method, "sparsity": sparsity, "scope": "global", "schedule": "gradual"},
        "finetune": {**_tuned(searched), "quantization_aware": True},
        "quantize": {"num_bits": 3, "strategy": "tensor", "method": "smallest_error"},
    }


def _tuned(searched: Searched) -> dict[str, Any]:
    step = {
        "epochs": searched.epochs,
        "batch_size": searched.batch_size,
        "lr": searched.lr,
        "schedule": "one_cycle",
    }
    return {**step, "distill": 0.7} if searched.is_labelled else step


_FAMILIES = {"quantize": _quantized, "delete": _deleted, "zero": _zeroed}
