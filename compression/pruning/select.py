"""From scores to the units that go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fleetpress.compression.errors import MethodError, PruningError
from fleetpress.compression.layers import matrices
from fleetpress.compression.pruning.labels import Atoms, Mask
from fleetpress.compression.pruning.method import PruningMethod, ScoreContext
from fleetpress.compression.pruning.structure import reading
from fleetpress.compression.pruning.units import Units
from fleetpress.compression.selection import check_names

_TINY = 1e-300  # a group whose scores are all 0 stays at 0


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """How much of what to delete.

    `sparsity` is the share of the deletable units of every group of coupled layers (scope layer) or of the model (scope
    global). The thresholds are compared with gradient_mean and gradient_std; a unit below both goes. `targets` and
    `ignore` choose layers, `structure` the kinds of units (`STRUCTURES`); empty means channels and heads. With
    `normalize` mean, scope global compares scores over the mean score of their group: layers whose weights or gradients
    are small as a whole then are not deleted as a whole. `layers` gives single layers a share of their own, and those
    coupled with them the same one; without `sparsity` all others keep their units.
    """

    method: str = "gradient_stability"
    sparsity: float | None = None
    mean_threshold: float | None = None
    std_threshold: float | None = None
    scope: str = "layer"
    normalize: str = "none"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    structure: tuple[str, ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)


def check(options: PruneOptions, methods: Sequence[str]) -> None:
    """Raise MethodError for options that do not go together."""
    thresholds = (options.mean_threshold, options.std_threshold)
    if options.method not in methods:
        raise MethodError(
            f"pruning method {options.method!r} is unknown; the methods are {', '.join(methods)}"
        )
    reading(options.structure)
    if options.scope not in ("layer", "global"):
        raise MethodError(f"scope {options.scope!r} is unknown; it is layer or global")
    if options.normalize not in ("none", "mean"):
        raise MethodError(f"normalize {options.normalize!r} is unknown; it is none or mean")
    if (options.sparsity is None) == (thresholds == (None, None)) and not options.layers:
        raise MethodError("give either `sparsity`, or `mean_threshold` and `std_threshold`")
    if options.layers and (options.scope == "global" or thresholds != (None, None)):
        raise MethodError("`layers` have shares of their own, which scope global and thresholds exclude")
    for name, share in options.layers.items():
        if not 0 <= share < 1:
            raise MethodError(f"{name}: sparsity {share} is not from 0 to below 1")
    if options.sparsity is not None and not 0 < options.sparsity < 1:
        raise MethodError(f"sparsity {options.sparsity} is not between 0 and 1")
    if options.sparsity is None and None in thresholds and not options.layers:
        raise MethodError("`mean_threshold` and `std_threshold` belong together; give both")
    if any(value is not None and not value > 0 for value in thresholds):
        raise MethodError("thresholds are positive numbers")


def choose(
    units: Units,
    method: PruningMethod,
    options: PruneOptions,
    context: ScoreContext,
    whole: Mapping[str, int] | None = None,
) -> Atoms:
    """Classes of the units that go; every dim of the program keeps its best unit at least.

    `whole` is how many units each group had before earlier rounds deleted some: the share is one of those.
    """
    scores = [_finite(method.score(context, group), group.name) for group in units.groups]
    sizes = {group.name: group.count for group in units.groups}
    whole = whole or sizes
    if options.layers:
        shares = _own_shares(units, options)
        going = [
            _lowest(score, _share(shares[group.name], whole[group.name], group.count))
            for group, score in zip(units.groups, scores, strict=True)
        ]
    elif options.sparsity is None:
        going = _below_thresholds(units, method, options, context)
    elif options.scope == "layer":
        going = [
            _lowest(score, _share(options.sparsity, whole[group.name], group.count))
            for group, score in zip(units.groups, scores, strict=True)
        ]
    else:
        left = sum(sizes.get(name, 1) for name in whole)  # a group of one unit is a group no more
        if options.normalize == "mean":
            scores = [score / score.mean().clamp(min=_TINY) for score in scores]
        everything = _lowest(torch.cat(scores), _share(options.sparsity, sum(whole.values()), left))
        going = list(torch.split(everything, [group.count for group in units.groups]))
    classes = np.concatenate([group.classes for group in units.groups])
    chosen = torch.cat(going).numpy()
    return _none_emptied(units, classes, torch.cat(scores).numpy(), chosen)


def _own_shares(units: Units, options: PruneOptions) -> dict[str, float]:
    """The share of every group, by its name: that of the layers in it which have one."""
    check_names(tuple(units.owners.values()), options.layers)
    found = {}
    for group in units.groups:
        inside = [
            name
            for name in options.layers
            if any(part.name in group.members for part in matrices(units.owners[name]))
        ]
        shares = {options.layers[name] for name in inside}
        if len(shares) > 1:
            raise MethodError(
                f"{', '.join(inside)} lose the same units, but have different shares; give one of them a share"
            )
        found[group.name] = shares.pop() if shares else options.sparsity or 0.0
    return found


def _finite(score: Tensor, group: str) -> Tensor:
    if not score.isfinite().all():
        raise PruningError(
            f"{group}: scores are not finite; the weights or gradients hold NaN or infinite values"
        )
    return score


def _share(sparsity: float, whole: int, left: int) -> int:
    """How many of the units that are `left` go, so that floor(sparsity * whole) are gone."""
    # A product like 0.29 * 100 = 28.999... means 29.
    return max(0, math.floor(sparsity * whole + 1e-9) - (whole - left))


def _lowest(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` lowest scores, the lowest index first among equals."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.sort(scores, stable=True).indices[:count]] = True
    return mask


def _below_thresholds(
    units: Units, method: PruningMethod, options: PruneOptions, context: ScoreContext
) -> list[Tensor]:
    if method.spread is None:
        raise MethodError(
            f"method {method.name} has no gradients to compare with mean_threshold and std_threshold; give `sparsity`"
        )
    limit_mean, limit_std = options.mean_threshold, options.std_threshold
    assert limit_mean is not None, "checked before"
    assert limit_std is not None, "checked before"
    going = []
    for group in units.groups:
        mean, std = method.spread(context, group)
        going.append((mean < limit_mean) & (std < limit_std))
    return going


def _none_emptied(units: Units, classes: Atoms, scores: npt.NDArray[np.float64], chosen: Mask) -> Atoms:
    """Classes that go, after every dim that would lose all its indices got its best unit back."""
    coupling = units.coupling
    place = np.full(len(coupling.roots), -1, dtype=np.int64)
    place[classes] = np.arange(len(classes))
    going = chosen.copy()
    for axis in coupling.axes():
        spots = place[coupling.classes(axis)]
        if (spots >= 0).all() and going[spots].all():
            going[spots[::-1][np.argmax(scores[spots[::-1]])]] = (
                False  # the last of equals: the first ones go
            )
    return classes[going]
