"""Schedules are those of torch.optim and of their papers; `constant` changes nothing."""

import math

import pytest
import torch
from torch import nn

from fleetpress.compression.optimizers import OPTIMIZERS, SCHEDULES, TrainOptions


def rates(name: str, steps: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = OPTIMIZERS["sgd"]([nn.Parameter(torch.ones(1))], TrainOptions(optimizer="sgd", lr=0.5))
    schedule = SCHEDULES[name](optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def test_constant_is_constant() -> None:
    assert rates("constant", 7) == [0.5] * 7


def test_cosine_falls_to_zero() -> None:
    # Loshchilov & Hutter 2017, equation 5, with a lowest rate of 0.
    wanted = [0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates("cosine", 20) == pytest.approx(wanted, rel=1e-6)


def test_one_cycle_rises_and_falls() -> None:
    found = rates("one_cycle", 100)
    top = found.index(max(found))
    assert found[0] == pytest.approx(0.5 / 25)
    assert top == 29
    assert found[top] == pytest.approx(0.5)
    assert found[-1] < 1e-4
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_schedule_takes_few_steps(name: str, steps: int) -> None:
    assert all(math.isfinite(rate) for rate in rates(name, steps))
