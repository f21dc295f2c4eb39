"""How long a candidate is fine-tuned, in which batches, and on how many folds it is measured. Pure.

Small nets on few samples get many epochs, which cost nothing; large ones get one. So a candidate takes about as long
whatever the model, and small data are measured on every fold, where one alone would say little.
"""

import math
from dataclasses import dataclass

_WORK = 5e10  # multiply-accumulates of one candidate, forward and backward: some ten seconds of a core
_STEP_WORK = 5e7  # that a step takes at least, however small the net
_BACKWARD = 3  # a step's work over that of a forward pass
_MOST_EPOCHS = 12
_FEW = 50_000  # samples that are seen twice,
_TWICE = 10  # unless that is so many times the work
_BATCHES = ((2048, 32), (50_000, 64), (math.inf, 128))  # samples of a batch, up to so many in all
_ENOUGH = 3000  # samples that tell a drop of half a percent
GROWTH = {"ramp": 0.5, "interval": 32}  # how zeros grow during fine-tuning, as `GradualOptions`


@dataclass(frozen=True, kw_only=True)
class Effort:
    """`epochs` of fine-tuning in batches of `batch_size`, `steps` in all; `folds` to train and measure for."""

    epochs: int
    batch_size: int
    folds: int
    steps: int

    @property
    def grows(self) -> bool:
        """Whether zeros can grow on the way: even if they come in one cut, half of an interval is left to mend it."""
        return self.steps >= GROWTH["interval"]


def effort(samples: int, macs: int, *, folds: int, epochs: int | None) -> Effort:
    """For so many train `samples`, a net of so many `macs` a sample, at most so many `folds`; with `epochs` if given.

    Fine-tuned candidates are measured on further folds while the work allows it and one holds too few samples.
    """
    kept = max(1, samples - samples // folds)
    batch_size = next(size for most, size in _BATCHES if samples <= most)
    steps = -(-kept // batch_size)
    work = steps * max(_STEP_WORK, batch_size * _BACKWARD * macs)
    wanted = min(folds, -(-_ENOUGH * folds // max(1, samples)))
    least = 2 if kept <= _FEW and 2 * work <= _TWICE * _WORK else 1
    fitting = max(least, min(_MOST_EPOCHS, round(_WORK / work / min(2, wanted))))
    own = fitting if epochs is None else epochs
    possible = max(1, int(_WORK // max(1.0, own * work)))
    return Effort(epochs=own, batch_size=batch_size, folds=min(wanted, possible), steps=own * steps)
