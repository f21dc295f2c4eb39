"""Factors made in place are those that torch gives, under any order of columns."""

import pytest
import torch

from fleetpress.compression.factors import damped_factor, invert_upper, turn_around


@pytest.mark.parametrize("size", [1, 6, 257, 700])
def test_factors_are_those_of_torch(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size + 9, size, generator=generator, dtype=torch.float64)
    gram, order = x.T @ x, torch.randperm(size, generator=generator)
    kept = gram.clone()
    plain = damped_factor(gram, order, [0.5], torch.float64)
    assert plain is not None
    damped = gram + 0.5 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(plain, torch.linalg.cholesky(damped[order][:, order]))
    assert torch.equal(gram, kept)
    turned = plain.clone()
    turn_around(turned)
    assert torch.equal(turned, plain.flip(0, 1))
    invert_upper(turned)
    torch.testing.assert_close(turned, torch.linalg.inv(plain.flip(0, 1)))


def test_more_damping_is_taken_where_less_gives_no_factor() -> None:
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    order = torch.arange(2)
    found = damped_factor(gram, order, [0.1, 1.5], torch.float32)
    torch.testing.assert_close(found, torch.linalg.cholesky(gram + 1.5 * torch.eye(2)))
    assert damped_factor(gram, order, [0.1, 0.2], torch.float32) is None


def test_columns_that_are_dead_count_as_one() -> None:
    gram, dead = torch.diag(torch.tensor([4.0, 0.0])), torch.tensor([False, True])
    found = damped_factor(gram, torch.tensor([1, 0]), [5.0], torch.float32, dead)
    torch.testing.assert_close(found, torch.diag(torch.tensor([6.0, 9.0]).sqrt()))
