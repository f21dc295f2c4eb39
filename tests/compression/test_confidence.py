"""Drops with their spread, against the textbook where there is a formula."""

import math

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from fleetpress.compression.confidence import (
    Difference,
    difference,
    sample_sums,
    value_of,
    without_memory,
)
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.evaluation import Runner, all_outputs, evaluate
from fleetpress.compression.metrics import METRICS, Sums


def _right(pattern: list[int]) -> list[Sums]:
    return [{"right": float(one), "count": 1.0} for one in pattern]


def test_the_spread_of_paired_decisions_is_that_of_the_formula() -> None:
    """Accuracies of pairs differ by the mean of n values in -1, 0, 1, whose standard error is known."""
    lost, won, same = 30, 10, 360
    before = _right([1] * lost + [0] * won + [1] * same)
    after = _right([0] * lost + [1] * won + [1] * same)
    found = difference("accuracy", before, after, seed=3)
    n = lost + won + same
    mean = (lost - won) / n
    assert found.drop == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt(((lost + won) / n - mean**2) / n), rel=0.08)
    assert found.low < mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error, rel=0.1)
    assert found == difference("accuracy", before, after, seed=3)


def test_equal_models_differ_by_nothing() -> None:
    found = difference("accuracy", _right([1, 0, 1]), _right([1, 0, 1]))
    assert (found.drop, found.standard_error, found.low, found.high) == (0, 0, 0, 0)


def test_pairs_need_the_same_samples() -> None:
    with pytest.raises(DataMismatchError, match="the same ones"):
        difference("accuracy", _right([1]), _right([1, 1]))


@pytest.mark.parametrize("metric", sorted(METRICS.keys() - {"perplexity", "token_accuracy"}))
def test_sums_of_samples_are_those_of_all(metric: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    nets = [nn.Linear(5, 3).eval() for _ in range(2)]
    programs = [export(net, (x[:2],), dynamic_shapes=({0: Dim("batch")},)) for net in nets]
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0]) if metric == "accuracy" else torch.randn(7, 3)
    arrays = {"inputs": x, "targets": targets}
    runner, reference = Runner(programs[0]), Runner(programs[1])
    found = sample_sums(runner, arrays, metric, reference=reference, batch_size=3)
    assert len(found) == len(x)
    assert value_of(metric, found) == pytest.approx(evaluate(runner, arrays, metric, reference=reference))
    spread = difference(metric, found, sample_sums(reference, arrays, metric, reference=runner))
    assert spread.low <= spread.drop <= spread.high
    outputs = all_outputs(reference, arrays, batch_size=3)
    assert sample_sums(runner, arrays, metric, reference=outputs, batch_size=3) == found
    itself = sample_sums(runner, arrays, metric, reference=runner)
    assert itself == sample_sums(runner, arrays, metric, reference=Runner(programs[0]))


@pytest.mark.parametrize(
    ("unseen", "seen", "memory", "drop"),
    [
        (0.02, 0.012, 0.03, 0.012),  # it forgot what it did not see again
        (0.02, 0.001, 0.005, 0.015),  # it learnt by heart itself: no more goes off than the other knew
        (0.02, 0.03, 0.05, 0.02),
        (0.02, 0.0, -0.01, 0.02),  # the model before is better on eval data: it knows nothing by heart
    ],
)
def test_what_was_known_by_heart_is_no_loss(unseen: float, seen: float, memory: float, drop: float) -> None:
    def one(value: float, error: float) -> Difference:
        return Difference(
            before=0.9, after=0.9 - value, drop=value, standard_error=error, low=0.0, high=0.1, samples=9
        )

    found = without_memory(one(unseen, 0.001), one(seen, 0.002), memory)
    assert found.drop == pytest.approx(drop)
    assert found.standard_error == (0.001 if found.drop == unseen else 0.002)
