"""What recipes of a search are made of: options of layers, shares of units, corrected prices, settings. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleetpress.compression.joint_allocation import Deletion, Part
from fleetpress.compression.unit_operations import Operations

CALIBRATION = {"samples": 512, "batch_size": 32}
STRUCTURES = ("channel", "head", "recurrent")


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

    `deletions` are shares of every group of units that may go, `parts` what of each layer goes with them. Where
    operations count, there are instead `narrowings`, such shares in finer steps, and `operations`, what of all goes
    with them.
    """

    layers: Mapping[str, Sequence[Sensed]] = field(default_factory=dict)
    deletions: Mapping[str, Sequence[Deletion]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    narrowings: Mapping[str, Sequence[Deletion]] = field(default_factory=dict)
    operations: Sequence[Operations] = ()

    @property
    def float_bytes(self) -> int:
        """Bytes of all these layers as they are."""
        return sum(max(option.bytes for option in options) for options in self.layers.values())

    @property
    def macs(self) -> float:
        """Multiply-accumulates of a call, while all units are there."""
        return sum(one.macs for one in self.operations)

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
    targets, so that fine-tuning may be guided by the model itself beside them; `grows` that there are steps enough for
    zeros to grow in. At once they would cost a net far more than is expected. `float_bits` are those of a float before.
    """

    epochs: int
    method: str
    lr: float = 1e-3
    batch_size: int = 64
    folds: int = 1
    is_labelled: bool = True
    grows: bool = True
    float_bits: float = 32.0


@dataclass(frozen=True, kw_only=True)
class Prices:
    """By which factors the expected increases of fine-tuned candidates are corrected, after what was measured.

    `groups` are factors of single groups of units, where only deletions are chosen. `training` is what fine-tuning adds
    by itself.
    """

    codes: float = 1.0
    zeros: float = 1.0
    deletion: float = 1.0
    training: float = 0.0
    groups: Mapping[str, float] = field(default_factory=dict)


UNCORRECTED = Prices()


def tuned(searched: Searched) -> dict[str, Any]:
    """The step `finetune` of a candidate."""
    step = {
        "epochs": searched.epochs,
        "batch_size": searched.batch_size,
        "lr": searched.lr,
        "schedule": "one_cycle",
    }
    return {**step, "distill": 0.7} if searched.is_labelled else step
