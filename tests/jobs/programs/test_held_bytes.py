"""What a process remembers is bounded by its size, and a few values are kept whatever that is."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fleetpress.jobs.programs import materials
from fleetpress.jobs.programs.held_bytes import held_bytes
from fleetpress.storage.programs import module_to_program


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    materials.forget()
    yield
    materials.forget()


def test_tensors_count_with_what_holds_them() -> None:
    tensor = torch.zeros(1000)
    assert held_bytes(tensor) == 4000
    assert 8000 < held_bytes({"a": tensor, "b": [tensor]}) < 9000
    program = module_to_program(nn.Linear(100, 100).eval(), [torch.zeros(2, 100)])
    assert 40_400 < held_bytes(program) < 4_000_000
    assert held_bytes({"sum": 1.0, "count": 2}) < 1000


def _asked(sizes: list[int]) -> list[int]:
    """Which of the values have to be built again when all are asked for a second time, the newest first."""
    built: list[int] = []

    def build(index: int) -> torch.Tensor:
        built.append(index)
        return torch.zeros(sizes[index], dtype=torch.uint8)

    for index in range(len(sizes)):
        materials.remembered(str(index), lambda index=index: build(index))  # type: ignore[misc]
    built.clear()
    for index in reversed(range(len(sizes))):
        materials.remembered(str(index), lambda index=index: build(index))  # type: ignore[misc]
    return built


def test_many_small_values_are_kept() -> None:
    assert _asked([1000] * 100) == []


def test_large_values_push_out_no_small_ones() -> None:
    large = 60 << 20
    again = _asked([1000, large, 1000, *[large] * 9])
    assert not {0, 2} & set(again)
    assert 1 in again


def test_small_values_are_bounded_together() -> None:
    again = _asked([3 << 20] * 30)
    assert 0 in again
    assert 29 not in again


def test_of_large_values_the_last_ones_are_kept() -> None:
    large = 60 << 20
    assert _asked([large] * 6) == []
    assert 0 in _asked([large] * 9)
