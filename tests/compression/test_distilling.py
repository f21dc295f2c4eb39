"""The distance to a teacher: Hinton's for scores of classes, a mean square for everything else."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.distilling import distance


def scores(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_classes_are_compared_by_softened_probabilities(temperature: float) -> None:
    ours, theirs, labels = scores(0, 8, 5), scores(1, 8, 5), torch.zeros(8, dtype=torch.long)
    p, q = (theirs / temperature).softmax(1), (ours / temperature).softmax(1)
    wanted = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(distance("cross_entropy", ours, theirs, labels, temperature), wanted)


def test_at_high_temperatures_it_is_half_the_mean_square_of_centred_scores() -> None:
    # Hinton et al. 2015, section 2.1.
    ours, theirs, labels = (
        scores(0, 8, 5).double(),
        scores(1, 8, 5).double(),
        torch.zeros(8, dtype=torch.long),
    )
    centred = [value - value.mean(1, keepdim=True) for value in (ours, theirs)]
    wanted = 0.5 * functional.mse_loss(*centred)
    got = distance("cross_entropy", ours, theirs, labels, 1e4)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)


def test_class_axes() -> None:
    ours, theirs, labels = scores(0, 2, 5, 3), scores(1, 2, 5, 3), torch.zeros(2, 3, dtype=torch.long)
    by_pixel = distance("cross_entropy", ours, theirs, labels, 2.0)
    tokens = distance("causal_lm", ours.movedim(1, 2), theirs.movedim(1, 2), labels, 2.0)
    torch.testing.assert_close(by_pixel, tokens)
    assert distance("cross_entropy", ours, ours, labels, 2.0) == 0


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_masked_scores_add_nothing(loss: str) -> None:
    ours, theirs = scores(0, 8, 5), scores(1, 8, 5)
    mask = torch.arange(8) >= 5
    filled = [functional.pad(value, (0, 3)).masked_fill(mask, -torch.inf) for value in (ours, theirs)]
    given = filled[0].requires_grad_()
    found = distance(loss, given, filled[1], torch.zeros(8, dtype=torch.long), 2.0)
    (gradient,) = torch.autograd.grad(found, given)
    wanted = distance(loss, ours, theirs, torch.zeros(8, dtype=torch.long), 2.0)
    torch.testing.assert_close(found, wanted if loss == "cross_entropy" else wanted * 5 / 8)
    assert gradient.isfinite().all()
    assert not gradient[:, 5:].any()


def test_other_outputs_by_their_mean_square() -> None:
    ours, theirs = scores(0, 4, 3), scores(1, 4, 3)
    assert distance("mse", ours, theirs, theirs, 2.0) == functional.mse_loss(ours, theirs)
