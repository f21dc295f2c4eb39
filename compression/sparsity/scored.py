"""Weights that go by a score of each, made of the weight and its gradients: what such methods share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleetpress.compression.errors import MethodError
from fleetpress.compression.sparsity.amount import (
    check_either,
    lowest,
    lowest_of_groups,
    parse,
    reason_against_pattern,
    share_of,
)
from fleetpress.compression.sparsity.magnitudes import reason_against_dtype
from fleetpress.compression.sparsity.method import Options, ScoreWeights, SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-300  # a tensor whose scores are all 0 stays at 0


def scored_method(
    *, name: str, summary: str, paper: str, score: ScoreWeights, expands: bool
) -> SparsityMethod:
    """The table entry of a method that is its `score`; see SparsityMethod for `expands`."""
    return SparsityMethod(
        name=name,
        summary=summary,
        paper=paper,
        takes=("sparsity", "pattern"),
        check=_check,
        reason_against=_reason_against,
        zeroed=_zeroed,
        compares_tensors=True,
        score=score,
        expands_loss=expands,
    )


def _check(options: Options) -> None:
    check_either(options)
    if options.get("pattern") is not None and options.get("scope") == "global":
        raise MethodError(
            f"scope global has no meaning for pattern {options['pattern']}, which tells what goes in every row"
        )


def _reason_against(options: Options, dtype: str, shape: Sequence[int]) -> str | None:
    return reason_against_pattern(options, shape) or reason_against_dtype(dtype)


def _zeroed(options: Options, shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    if options.get("pattern") is None:
        return share_of(options["sparsity"], count)
    kept, group = parse(options["pattern"])
    return count // group * (group - kept)


def zero_lowest(rows: Tensor, scores: Tensor, options: Options) -> Tensor:
    """`rows` [output units, entries] without the share of all entries, or the entries of every M neighbours, that have
    the lowest `scores` (as `rows`, float64); the first of them among equals. Raises MethodError for NaN.
    """
    _check_numbers(scores)
    if options.get("pattern") is not None:
        return rows.masked_fill(lowest_of_groups(scores, options["pattern"]), 0)
    going = lowest(scores.reshape(1, -1), share_of(options["sparsity"], scores.numel()))
    return rows.masked_fill(going.view(rows.shape), 0)


def zero_lowest_of_all(tensors: Sequence[tuple[Tensor, Tensor]], options: Options) -> list[Tensor]:
    """The same of several `rows` with their `scores`, ranked together.

    With `normalize` mean, scores count as shares of the mean of their tensor.
    """
    import torch

    found = []
    for _, scores in tensors:
        _check_numbers(scores)
        is_shared = options.get("normalize") == "mean"
        found.append((scores / scores.mean().clamp(min=_TINY) if is_shared else scores).flatten())
    everything = torch.cat(found)
    count = share_of(options["sparsity"], everything.numel())
    going = torch.split(lowest(everything.view(1, -1), count)[0], [len(scores) for scores in found])
    return [
        rows.masked_fill(gone.view(rows.shape), 0) for (rows, _), gone in zip(tensors, going, strict=True)
    ]


def _check_numbers(scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise MethodError(
            "scores of its weights are not finite; look for NaN and very large numbers in the data and the weights"
        )
