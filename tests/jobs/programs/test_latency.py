"""Latency on a clock of our own, so that the numbers are exact."""

from collections.abc import Callable

import pytest
import torch

from fleetpress.jobs.programs.latency import latency_ms


class Machine:
    """Calls that take a known time on a clock that only they move."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.calls = 0
        self._seconds = seconds

    def __call__(self) -> None:
        """Take the time of this call."""
        self.now += self._seconds(self.calls)
        self.calls += 1

    def clock(self) -> float:
        """The time."""
        return self.now


def test_the_median_without_the_warm_up() -> None:
    machine = Machine(lambda call: 0.02 if call < 3 else 0.001 * (1 + call % 3))
    assert latency_ms(machine, clock=machine.clock) == pytest.approx(2)
    assert machine.calls == 33


def test_a_slow_model_is_timed_within_the_limit() -> None:
    machine = Machine(lambda _: 0.11)
    assert latency_ms(machine, clock=machine.clock) == pytest.approx(110)
    assert machine.now <= 0.5


def test_a_model_slower_than_the_limit_is_timed_once() -> None:
    machine = Machine(lambda _: 3.0)
    assert latency_ms(machine, clock=machine.clock) == pytest.approx(3000)
    assert machine.calls == 1


def test_a_real_module_is_called_with_its_arguments_and_without_gradients() -> None:
    seen: list[bool] = []

    def module(x: torch.Tensor, *, scale: float) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return x * scale

    assert 0 < latency_ms(module, (torch.ones(3),), {"scale": 2.0}, repeats=3) < 500
    assert seen == [False] * 6
