"""How wrong the solver's prices were: factors of what was expected, by what came out. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

_PRIOR = 0.3  # how much the common ratio counts beside a measurement

Tried = Sequence[tuple[Mapping[str, float], float]]
"""Of every candidate that was measured, what was expected of it, by name, and what came out."""


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """What was `expected` [candidates, names] and `measured` [candidates] of those that tell of prices."""

    names: tuple[str, ...]
    expected: NDArray[np.float64]
    measured: NDArray[np.float64]


def telling(tried: Tried) -> Expectations | None:
    """Those of which something was expected, and came; None if there are none."""
    known = [
        (expected, measured)
        for expected, measured in tried
        if measured > 0 and math.isfinite(measured) and sum(expected.values()) > 0
    ]
    if not known:
        return None
    names = tuple(known[0][0])
    return Expectations(
        names=names,
        expected=np.array([[expected[name] for name in names] for expected, _ in known]),
        measured=np.array([value for _, value in known]),
    )


def factors(told: Expectations, ratio: float, constant: float | None = None) -> NDArray[np.float64]:
    """By what each name's price is to be multiplied beside the common `ratio`, and how much of the `constant` is to be
    added, if there is one; none is negative.

    Least squares over relative errors, every factor drawn to 1 and the constant's to 0: a handful of candidates that
    resemble one another tell names apart only so well.
    """
    columns, drawn = ratio * told.expected, np.ones(len(told.names))
    if constant is not None:
        columns, drawn = np.c_[columns, np.full(len(columns), constant)], np.append(drawn, 0.0)
    strength = math.sqrt(_PRIOR)
    left = np.r_[columns / told.measured[:, None], strength * np.eye(len(drawn))]
    found, _ = nnls(left, np.r_[np.ones(len(columns)), strength * drawn])
    return np.asarray(found)
