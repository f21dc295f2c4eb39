"""Recipes that a search may try, as families of one number each: how much of the model is left. Pure.

A family is a way to compress; its number x, from 1 (nothing done) towards 0, orders its recipes from harmless to
drastic. So a search in one dimension a family is enough: where a recipe was good, smaller ones are worth a trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fleetpress.compression.allocation import Option, allocate
from fleetpress.compression.joint_allocation import Deletion, Part

Family = Literal["quantize", "delete", "zero", "joint"]
CALIBRATION = {"samples": 512, "batch_size": 32}
_LEAST_SHARE = 0.02
STRUCTURES = ("channel", "head", "recurrent")
_BITS_OF_KEPT = 8  # that a weight which is not zero takes, with its place


@dataclass(frozen=True, kw_only=True)
class Sensed:
    """What can be done to a layer: `settings` of its own in the `quantize` step (None: leave it), bytes, increase.

    `bytes` are those in a `.pt2`, `coded_bytes` those in an archive. One that `is_trained` has a share of `zeros` and
    counts on fine-tuning; `by_zeros` is what they alone add to the increase.
    """

    layer: str
    settings: Mapping[str, Any] | None
    bytes: int
    increase: float
    coded_bytes: int = 0
    is_trained: bool = False
    zeros: float = 0.0
    by_zeros: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Everything that was sensed of a program: options layer by layer, and the bytes of its float weights.

    `deletions` are shares of every group of units that may go, `parts` what of each layer goes with them.
    """

    layers: Mapping[str, Sequence[Sensed]]
    deletions: Mapping[str, Sequence[Deletion]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)

    @property
    def float_bytes(self) -> int:
        """Bytes of all these layers as they are."""
        return sum(max(option.bytes for option in options) for options in self.layers.values())

    @property
    def least_bytes(self) -> int:
        """Bytes of all these layers with the cheapest options."""
        return sum(min(option.bytes for option in options) for options in self.plain.values())

    @property
    def plain(self) -> dict[str, list[Sensed]]:
        """Options that need no fine-tuning."""
        return {name: [one for one in some if not one.is_trained] for name, some in self.layers.items()}


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What recipes are made of: `epochs` of fine-tuning (0: none) at the rate `lr`, the quantization method.

    `folds` are those that a fine-tuned candidate is built and measured for. `is_labelled` says that the data have
    targets, so that fine-tuning may be guided by the model itself beside them.
    """

    epochs: int
    method: str
    lr: float = 1e-3
    batch_size: int = 64
    folds: int = 1
    is_labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class Prices:
    """By which factors the expected increases of fine-tuned candidates are corrected, after what was measured."""

    codes: float = 1.0
    zeros: float = 1.0
    deletion: float = 1.0


def recipe_of(
    family: Family, x: float, table: Table, searched: Searched, prices: Prices = Prices()
) -> dict[str, Any] | None:
    """The steps of the family's recipe at x, or None if there is none so small."""
    return _FAMILIES[family](x, table, searched, prices)


def starts(searched: Searched, cost: str, share: float | None) -> dict[Family, tuple[float, ...]]:
    """Where the search begins in every family that changes the cost; `share` of the bytes is what a budget leaves."""
    found: dict[Family, tuple[float, ...]] = {}
    if cost == "bytes":
        # Shares of 32 bits: about 8, 5, 4 and 3 bits a weight with their scales.
        found["quantize"] = (0.26, 0.17, 0.132, 0.1) if share is None else _parts(share, 0.95, 0.85, 0.7, 0.5)
    if searched.epochs and cost == "bytes":
        found["zero"] = (0.05, 0.025) if share is None else _parts(share, 0.9, 0.6)
        found["joint"] = (0.04, 0.02) if share is None else _parts(share, 0.9, 0.7)
    if searched.epochs or cost != "bytes":
        found["delete"] = (
            (0.6, 0.4) if share is None or cost == "bytes" else _parts(share, 0.95, 0.8, 1.1, 0.65)
        )
    return found


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
            "structure": list(STRUCTURES),
            "compensate": "least_squares",
        },
    }
    if searched.epochs:
        steps["finetune"] = tuned(searched)
    return {
        **steps,
        "calibrate": dict(CALIBRATION),
        "quantize": {"scheme": "W4A16", "group_size": 64, "method": searched.method},
    }


def _zeroed(x: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """Weights made zero while the others are trained for 3-bit codes; places and codes take about x of the bytes."""
    sparsity = round(1 - x * 32 / _BITS_OF_KEPT, 4)
    if not 0.3 < sparsity < 1:
        return None
    method = "magnitude_unstructured"
    return {
        "prune": {"method": method, "sparsity": sparsity, "scope": "global", "schedule": "gradual"},
        "finetune": {**tuned(searched), "quantization_aware": True},
        "quantize": {"num_bits": 3, "strategy": "tensor", "method": "smallest_error"},
    }


def tuned(searched: Searched) -> dict[str, Any]:
    """The step `finetune` of a candidate."""
    step = {
        "epochs": searched.epochs,
        "batch_size": searched.batch_size,
        "lr": searched.lr,
        "schedule": "one_cycle",
    }
    return {**step, "distill": 0.7} if searched.is_labelled else step


def _joint(x: float, table: Table, searched: Searched, prices: Prices) -> dict[str, Any] | None:
    """Deleted units, zeros and bits of every layer, chosen together within x of the float bytes, and fine-tuned."""
    from .joint import joint_recipe

    return joint_recipe(x * table.float_bytes, table, searched, prices)


_FAMILIES = {"quantize": _quantized, "delete": _deleted, "zero": _zeroed, "joint": _joint}
