"""Chances of binary decisions, learned while they are coded: counts in several contexts, mixed in the logistic domain.

Counts give every context a chance; the mixed one is the logistic of their weighted log odds, and the weights follow
the gradient of the coding cost (Mattes and Mahoney's context mixing, as in PAQ; Mahoney 2005, "Adaptive weighing of
context models for lossless data compression"). Decisions come in blocks, one array operation for all of a block, and
learn from the blocks before. All arithmetic is on whole numbers: it gives the same chances on every machine.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from .bit_stream import ONE, BitStream, Integers

_UNIT = 256  # log odds are whole numbers of 1/256
_LARGEST = 12 * _UNIT - 1  # logistic(12) leaves less than 1/65536
_WEIGHT = 1 << 16  # a mixing weight of 1
_FIRST_SUM = 85_000  # all weights together, at first: independent evidence adds up to more than its mean
_RATE = 20_000  # of learning, in 1/65536 of a Newton step
_INERTIA = 150 * ONE * ONE  # curvature that the first weights count for


class MixedBits:
    """One kind of decision in several contexts; `prior` / 65536 is the chance of 1 that is known beforehand.

    `sizes` are the numbers of contexts of each table, `strength` the decisions that the prior counts for in each.
    """

    def __init__(self, sizes: Sequence[int], prior: int, strength: int) -> None:
        self._starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)[:, None]
        self._seen = np.full(sum(sizes), strength, np.int64)
        self._ones = np.full(sum(sizes), strength * prior, np.int64)  # in 1/65536
        self._prior = int(log_odds()[prior])
        first = _FIRST_SUM // len(sizes) if len(sizes) > 1 else _WEIGHT
        self._weights = np.full((len(sizes), 1), first, np.int64)
        self._curvature = np.full((len(sizes), 1), _INERTIA, np.int64)

    def code(self, stream: BitStream, contexts: Sequence[Integers], bits: Integers | None) -> Integers:
        """Code one block and learn from it: `contexts` holds an array of context numbers for each table."""
        if not contexts[0].size:
            return np.zeros(0, np.int64)
        places = np.stack(contexts) + self._starts
        evidence = log_odds()[self._ones[places] // self._seen[places]] - self._prior
        mixed = self._prior + ((evidence * self._weights).sum(0) >> 16)
        chance = logistic()[np.clip(mixed, -_LARGEST, _LARGEST) + _LARGEST]
        found = stream.code(chance, bits)
        wrong = (found << 16) - chance
        spread = (chance * (ONE - chance)) >> 16
        self._curvature += (spread * evidence * evidence).sum(1, keepdims=True)
        gradient = (wrong * evidence).sum(1, keepdims=True)
        self._weights += gradient * (_RATE * _UNIT) // self._curvature
        np.add.at(self._seen, places.ravel(), 1)
        np.add.at(self._ones, places[:, found == 1].ravel(), ONE)
        return found


@cache
def log_odds() -> Integers:
    """By chance in 1/65536: the log odds. No value is so near to a half that two machines could round it apart."""
    chance = np.clip(np.arange(ONE, dtype=np.float64), 1, ONE - 1)
    odds: Integers = np.rint(_UNIT * np.log(chance / (ONE - chance))).astype(np.int64)
    return odds


@cache
def logistic() -> Integers:
    """By log odds from -`_LARGEST`: the chance in 1/65536."""
    odds = np.arange(-_LARGEST, _LARGEST + 1, dtype=np.float64) / _UNIT
    return np.clip(np.rint(ONE / (1 + np.exp(-odds))), 1, ONE - 1).astype(np.int64)
