"""Losses against torch and by hand; drawn targets follow the model's own distribution."""

import math

import pytest
import torch
from torch.nn import functional

from fleetpress.compression.losses import LOSSES, sampled_loss, sampled_targets
from fleetpress.compression.outputs import Meaning


def generator() -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(0)


def test_the_names_are_those_of_the_spec() -> None:
    assert list(LOSSES) == ["cross_entropy", "mse", "l1", "bce_with_logits", "causal_lm", "distillation"]
    assert [name for name, loss in LOSSES.items() if not loss.needs_targets] == ["distillation"]


def test_cross_entropy_ignores_minus_100_and_takes_any_whole_number() -> None:
    outputs = torch.randn(4, 3, generator=generator())
    targets = torch.tensor([0, -100, 2, 1], dtype=torch.int16)
    expected = functional.cross_entropy(outputs[[0, 2, 3]], torch.tensor([0, 2, 1]))
    torch.testing.assert_close(LOSSES["cross_entropy"].compute(outputs, targets), expected)
    assert LOSSES["cross_entropy"].weight(targets) == 3


def test_cross_entropy_of_nothing_but_ignored_labels_is_zero() -> None:
    assert LOSSES["cross_entropy"].compute(torch.randn(2, 3), torch.tensor([-100, -100])) == 0


def test_cross_entropy_takes_probabilities() -> None:
    outputs, soft = (
        torch.randn(4, 3, generator=generator()),
        torch.rand(4, 3, generator=generator()).softmax(1),
    )
    expected = -(soft * outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(LOSSES["cross_entropy"].compute(outputs, soft.double()), expected)


def test_cross_entropy_finds_the_classes_in_dimension_1_or_last() -> None:
    pixels, targets = (
        torch.randn(2, 3, 5, generator=generator()),
        torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]]),
    )
    expected = functional.cross_entropy(pixels, targets)
    torch.testing.assert_close(LOSSES["cross_entropy"].compute(pixels, targets), expected)
    torch.testing.assert_close(LOSSES["cross_entropy"].compute(pixels.transpose(1, 2), targets), expected)


@pytest.mark.parametrize(("name", "expected"), [("mse", 2.5), ("l1", 1.5), ("distillation", 2.5)])
def test_distances_do_not_broadcast_a_column_against_a_row(name: str, expected: float) -> None:
    assert float(LOSSES[name].compute(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 4.0]))) == expected


def test_binary_cross_entropy_takes_whole_numbers() -> None:
    got = LOSSES["bce_with_logits"].compute(torch.tensor([[0.0], [0.0]]), torch.tensor([1, 0]))
    assert float(got) == pytest.approx(math.log(2))


def test_causal_lm_predicts_the_next_token() -> None:
    tokens = torch.tensor([[0, 1, 2], [2, 0, -100]])
    outputs = torch.randn(2, 3, 4, generator=generator())
    logs = outputs.log_softmax(-1)
    expected = -(logs[0, 0, 1] + logs[0, 1, 2] + logs[1, 0, 0]) / 3
    torch.testing.assert_close(LOSSES["causal_lm"].compute(outputs, tokens), expected)
    assert LOSSES["causal_lm"].weight(tokens) == 3


def test_drawn_classes_follow_the_softmax() -> None:
    outputs = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    drawn = sampled_targets(outputs, generator(), meaning="logits")
    shares = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)
    same = sampled_targets(outputs.exp(), generator(), meaning="probabilities")
    assert (same == drawn).float().mean() > 0.999


def test_drawn_values_lie_around_the_outputs() -> None:
    drawn = sampled_targets(torch.full((20_000, 1), 7.0), generator(), meaning="values")
    assert drawn.mean() == pytest.approx(7, abs=0.05)
    assert drawn.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("meaning", ["logits", "probabilities", "values"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_loss_of_outputs_that_are_no_numbers_is_none_either(bad: float, meaning: Meaning) -> None:
    outputs = torch.full((4, 3), 0.5)
    outputs[1, 2] = bad
    assert not sampled_loss(outputs, generator(), meaning=meaning).isfinite()


def test_classes_without_any_chance_are_never_drawn() -> None:
    outputs = torch.tensor([0.0, -math.inf, 0.0]).expand(1000, 3)
    assert 1 not in sampled_targets(outputs, generator(), meaning="logits")
    assert sampled_loss(outputs, generator(), meaning="logits").isfinite()


@pytest.mark.parametrize("meaning", ["logits", "values"])
def test_masked_scores_add_nothing(meaning: Meaning) -> None:
    outputs = torch.randn(8, 3, generator=generator())
    hole = torch.full((8, 1), -math.inf)
    masked = torch.cat([outputs, hole], 1).requires_grad_()
    loss = sampled_loss(masked, generator(), meaning=meaning)
    (gradient,) = torch.autograd.grad(loss, masked)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[:, 3].any()
    target = torch.cat([outputs + 1, hole], 1)
    whole = LOSSES["distillation"].compute(outputs, outputs + 1)
    torch.testing.assert_close(LOSSES["distillation"].compute(masked, target), whole * 3 / 4)
    assert LOSSES["distillation"].compute(masked, torch.zeros(8, 4)).isinf()


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3)], ids=["samples", "tokens"])
def test_drawn_targets_give_gradients_where_the_distance_to_oneself_has_none(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, generator=generator(), requires_grad=True)
    (gradient,) = torch.autograd.grad(sampled_loss(outputs, generator(), meaning="logits"), outputs)
    (nothing,) = torch.autograd.grad(LOSSES["distillation"].compute(outputs, outputs.detach()), outputs)
    assert gradient.abs().max() > 0
    assert nothing.abs().max() == 0
