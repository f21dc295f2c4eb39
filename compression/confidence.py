"""How sure a difference between two models is: the same samples, drawn again and again (paired bootstrap).

Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 6 and 13; for pairs of models on one test set Koehn
2004, Statistical Significance Tests for Machine Translation Evaluation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fleetpress.compression.batches import TARGETS, Arrays, batches_in_order, check_arrays, check_rows, seeded
from fleetpress.compression.errors import DataMismatchError, MethodError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.metrics import METRICS, Sums, drop, merged

RESAMPLES = 1000
_EXTREMES = ("low", "high")  # of all samples, whichever are drawn
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`before` and `after` on the same samples, and how much worse `after` is, in the metric's own unit.

    `standard_error` is that of the drop; `low` to `high` holds it in 95 of 100 draws.
    """

    before: float
    after: float
    drop: float
    standard_error: float
    low: float
    high: float
    samples: int


def sample_sums(
    program: Runner,
    arrays: Arrays,
    metric: str,
    *,
    reference: Runner | Tensor | None = None,
    batch_size: int = 64,
) -> list[Sums]:
    """The metric's sums of every sample alone, in the order of the arrays; they add up to those of `evaluate`.

    `reference` is the original program, or what it puts out for these samples.
    Raises DataMismatchError for arrays that do not fit, MethodError for a metric that lacks its reference.
    """
    rule = METRICS[metric]
    if rule.needs == "reference" and reference is None:
        raise MethodError(f"the metric {metric} compares with the original model; give it as the reference")
    check_arrays(program.program, arrays, rule.needs == "targets", metric=metric)
    runners = [one for one in (program, reference) if isinstance(one, Runner)]
    sizes = [one.batch_size for one in runners if one.batch_size is not None]
    found: list[Sums] = []
    with torch.no_grad():
        for batch in batches_in_order(arrays, min([batch_size, *sizes])):
            outputs = program.outputs(batch)
            if rule.needs == "targets" or reference is None:
                expected = batch[TARGETS]
            elif isinstance(reference, Tensor):
                expected = reference[len(found) : len(found) + len(outputs)]
            else:
                expected = outputs if reference is program else reference.outputs(batch)
            check_rows(outputs, expected)
            for index in range(len(outputs)):
                sums = rule.start()
                rule.update(sums, outputs[index : index + 1], expected[index : index + 1])
                found.append(sums)
    return found


def value_of(metric: str, samples: Sequence[Sums]) -> float:
    """The metric over all of them."""
    total = METRICS[metric].start()
    for sums in samples:
        total = merged(total, sums)
    return METRICS[metric].value(total)


def difference(metric: str, before: Sequence[Sums], after: Sequence[Sums], *, seed: int = 0) -> Difference:
    """The drop between two models on the same samples, with its spread over `RESAMPLES` draws of as many samples.

    Raises DataMismatchError when there is not one entry a sample in both.
    """
    if len(before) != len(after) or not before:
        raise DataMismatchError(
            f"{len(before)} samples before and {len(after)} after: a paired comparison needs the same ones"
        )
    generator = seeded(seed, len(before))
    drops = []
    tables = _table(before), _table(after)
    step = max(1, _DRAWN_AT_ONCE // len(before))
    for start in range(0, RESAMPLES, step):
        draws = torch.randint(len(before), (min(step, RESAMPLES - start), len(before)), generator=generator)
        one, other = (_values(metric, table, draws) for table in tables)
        drops += [drop(metric, left, right) for left, right in zip(one, other, strict=True)]
    known = torch.tensor([value for value in drops if math.isfinite(value)], dtype=torch.float64)
    now, then = value_of(metric, before), value_of(metric, after)
    spread = known if len(known) > 1 else torch.full((2,), drop(metric, now, then), dtype=torch.float64)
    low, high = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(
        before=now,
        after=then,
        drop=drop(metric, now, then),
        standard_error=float(spread.std()),
        low=low,
        high=high,
        samples=len(before),
    )


def without_memory(unseen: Difference, seen: Difference, memory: float) -> Difference:
    """The drop of a fine-tuned model on samples that it was not tuned on, without what the model before knew by heart.

    The model before was trained on all of them, the tuned one has forgotten part of what it did not see again: part of
    the drop on `unseen` samples is memory. On `seen` ones, which both were trained on, it lacks only what it lost,
    unless it has learnt those by heart beyond what the model before did. So the drop there counts where it is less, but
    no more is taken off than the `memory` of the model before: by how much it is worse on data that no one saw.
    """
    lost = max(seen.drop, unseen.drop - max(0.0, memory))
    if not lost < unseen.drop:
        return unseen
    return replace(unseen, drop=lost, standard_error=max(seen.standard_error, unseen.standard_error))


def _table(samples: Sequence[Sums]) -> dict[str, Tensor]:
    """Sums by name, one entry a sample."""
    names = dict.fromkeys(name for sums in samples for name in sums)
    return {
        name: torch.tensor([sums.get(name, 0.0) for sums in samples], dtype=torch.float64) for name in names
    }


def _values(metric: str, table: dict[str, Tensor], draws: Tensor) -> list[float]:
    """The metric of every draw [draws, samples]."""
    sums = {}
    for name, column in table.items():
        if name in _EXTREMES:
            extreme = column.min() if name == "low" else column.max()
            sums[name] = extreme.expand(len(draws))
        else:
            sums[name] = column[draws].sum(1)
    rows = torch.stack(list(sums.values()), 1).tolist()
    return [METRICS[metric].value(dict(zip(sums, row, strict=True))) for row in rows]
