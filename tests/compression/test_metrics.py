"""Metrics against scikit-learn and by hand, the same for any split into batches."""

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, mean_squared_error, r2_score
from torch import Tensor

from fleetpress.compression.errors import MethodError
from fleetpress.compression.metrics import METRICS, default_metric, drop, merged, within


def value(metric: str, outputs: Tensor, expected: Tensor) -> float:
    """The metric of one batch."""
    sums = METRICS[metric].start()
    METRICS[metric].update(sums, outputs, expected)
    return METRICS[metric].value(sums)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_accuracy_is_scikit_learns() -> None:
    outputs, labels = random(50, 4), torch.arange(50) % 4
    assert value("accuracy", outputs, labels) == pytest.approx(accuracy_score(labels, outputs.argmax(1)))


def test_accuracy_does_not_count_ignored_labels() -> None:
    outputs = torch.eye(3)
    assert value("accuracy", outputs, torch.tensor([0, -100, 1])) == 0.5


def test_a_uint8_label_of_156_is_not_taken_for_minus_100() -> None:
    assert value("accuracy", torch.zeros(2, 200), torch.tensor([156, 0], dtype=torch.uint8)) == 0.5


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_accuracy_of_one_output_is_yes_or_no(shape: tuple[int, ...]) -> None:
    outputs = torch.tensor([-1.0, 2.0, 3.0, -4.0]).reshape(4, 1)
    assert value("accuracy", outputs, torch.tensor([0, 1, 0, 0]).reshape(shape)) == 0.75
    assert value("accuracy", outputs, torch.tensor([0.0, 1, 0, 0]).reshape(shape)) == 0.75


def test_accuracy_of_several_labels_a_sample_and_of_probabilities() -> None:
    outputs = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    assert value("accuracy", outputs, torch.tensor([[1, 0], [0, 1]])) == 0.75
    assert value("accuracy", outputs, torch.tensor([[0.9, 0.1], [0.2, 0.8]])) == 1.0


def test_accuracy_of_pixels_and_of_tokens() -> None:
    scores, labels = random(2, 3, 5), torch.arange(10).reshape(2, 5) % 3
    expected = float((scores.argmax(1) == labels).float().mean())
    assert value("accuracy", scores, labels) == pytest.approx(expected)
    assert value("accuracy", scores.transpose(1, 2), labels) == pytest.approx(expected)


def test_tokens_are_compared_with_the_next_one() -> None:
    tokens = torch.tensor([[0, 1, 2, -100]])
    outputs = torch.full((1, 4, 3), -50.0)
    outputs[0, 0, 1] = outputs[0, 1, 0] = outputs[0, 2, 0] = 50.0
    assert value("token_accuracy", outputs, tokens) == 0.5
    assert value("perplexity", torch.zeros(1, 4, 3), tokens) == pytest.approx(3)
    assert value("perplexity", outputs * 1e4, tokens) == math.inf


def test_errors_are_scikit_learns() -> None:
    outputs, targets = random(40, 1).double(), random(40, 1, seed=1).double()
    assert value("mse", outputs, targets[:, 0]) == pytest.approx(mean_squared_error(targets, outputs))
    assert value("r2", outputs, targets) == pytest.approx(r2_score(targets, outputs))


def test_psnr_by_hand() -> None:
    targets = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    assert value("psnr", targets + 0.1, targets) == pytest.approx(20)
    assert value("psnr", targets, targets) == math.inf


def test_agreement_and_cosine() -> None:
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert value("agreement", torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 0.0]]), reference) == pytest.approx(
        2 / 3
    )
    assert value("cosine", 5 * reference, reference) == 1.0
    assert value("cosine", -reference, reference) == pytest.approx((-1 - 1 + 1) / 3)
    assert value("cosine", torch.ones(3, 2), reference) == pytest.approx(2 * math.sqrt(0.5) / 3)

    masked = torch.cat([reference, torch.full((3, 1), -math.inf)], 1)
    assert value("cosine", masked, masked) == 1.0
    assert math.isnan(value("cosine", torch.ones(3, 3), masked))


TASKS = {
    "accuracy": (random(24, 5), torch.arange(24) % 5),
    "token_accuracy": (random(24, 4, 5), torch.arange(96).reshape(24, 4) % 5),
    "perplexity": (random(24, 4, 5), torch.arange(96).reshape(24, 4) % 5),
    "mse": (random(24, 3), random(24, 3, seed=1)),
    "psnr": (random(24, 3), random(24, 3, seed=1)),
    "r2": (random(24, 3), random(24, 3, seed=1)),
    "agreement": (random(24, 5), random(24, 5, seed=1)),
    "cosine": (random(24, 5), random(24, 5, seed=1)),
}


def test_every_metric_has_a_task() -> None:
    assert TASKS.keys() == METRICS.keys()


@settings(max_examples=40, deadline=None)
@given(metric=st.sampled_from(sorted(METRICS)), cuts=st.sets(st.integers(1, 23)))
def test_no_metric_depends_on_the_split_into_batches(metric: str, cuts: set[int]) -> None:
    outputs, expected = TASKS[metric]
    edges = [0, *sorted(cuts), 24]
    sums = METRICS[metric].start()
    for start, stop in itertools.pairwise(edges):
        part = METRICS[metric].start()
        METRICS[metric].update(part, outputs[start:stop], expected[start:stop])
        sums = merged(sums, part)
    assert METRICS[metric].value(sums) == pytest.approx(value(metric, outputs, expected), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_has_no_value(metric: str) -> None:
    assert math.isnan(METRICS[metric].value(METRICS[metric].start()))


def test_outputs_that_are_nan_give_no_good_value() -> None:
    outputs = torch.full((4, 3), math.nan)
    for metric in ("mse", "psnr", "r2", "cosine"):
        assert not within(metric, 0.9, value(metric, outputs, torch.ones(4, 3)), 1e9)


@pytest.mark.parametrize(
    ("metric", "before", "after", "max_drop", "passes"),
    [
        ("accuracy", 0.99, 0.98, 0.01, True),
        ("accuracy", 0.99, 0.9799, 0.01, False),
        ("accuracy", 0.5, 0.9, 0.0, True),
        ("accuracy", 0.90, 0.892, "1%", True),
        ("accuracy", 0.90, 0.890, "1%", False),
        ("perplexity", 20.0, 20.2, "1%", True),
        ("perplexity", 20.0, 20.3, "1%", False),
        ("perplexity", 20.0, 15.0, 0, True),
        ("mse", 0.10, 0.12, 0.01, False),
        ("r2", -0.5, -0.504, "1%", True),
        ("accuracy", 0.9, math.nan, 1.0, False),
        ("accuracy", math.nan, 0.9, 1.0, False),
        ("psnr", math.inf, math.inf, 0.0, True),
        ("psnr", math.inf, 60.0, 5.0, False),
        ("perplexity", 20.0, math.inf, "50%", False),
    ],
)
def test_within(metric: str, before: float, after: float, max_drop: float | str, passes: bool) -> None:
    assert within(metric, before, after, max_drop) is passes


def test_drop_is_positive_when_worse() -> None:
    assert drop("accuracy", 0.9, 0.8) == pytest.approx(0.1)
    assert drop("mse", 0.1, 0.3) == pytest.approx(0.2)
    assert drop("mse", 0.3, 0.1) == pytest.approx(-0.2)


@pytest.mark.parametrize("text", ["1", "one%", ""])
def test_a_bad_percentage_is_told(text: str) -> None:
    with pytest.raises(MethodError, match="max_drop"):
        within("accuracy", 0.9, 0.9, text)


def test_default_metrics() -> None:
    assert default_metric("cross_entropy", "values") == "accuracy"
    assert default_metric("causal_lm", "logits") == "perplexity"
    assert default_metric("distillation", "logits") == "agreement"
    assert default_metric("distillation", "probabilities") == "agreement"
    assert default_metric("distillation", "values") == "cosine"


def test_r2_of_large_offsets() -> None:
    targets = torch.from_numpy(numpy.linspace(1e4, 1e4 + 1, 50)).reshape(50, 1)
    assert value("r2", targets + 0.01, targets) == pytest.approx(r2_score(targets, targets + 0.01), rel=1e-4)
