"""The choice of one option a layer, against trying all of them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.compression.allocation import Option, allocate
from fleetpress.compression.errors import MethodError

_OPTIONS = st.builds(Option, cost=st.integers(1, 50).map(float), increase=st.integers(0, 100).map(float))
_LAYERS = st.lists(st.lists(_OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(_LAYERS, st.integers(1, 200))
def test_no_other_choice_within_the_budget_is_better(layers: list[list[Option]], budget: int) -> None:
    fitting = [
        choice for choice in itertools.product(*layers) if sum(option.cost for option in choice) <= budget
    ]
    if not fitting:
        with pytest.raises(MethodError, match="more than the budget"):
            allocate(layers, budget)
        return
    chosen = [options[index] for options, index in zip(layers, allocate(layers, budget), strict=True)]
    assert sum(option.cost for option in chosen) <= budget
    best = min(sum(option.increase for option in choice) for choice in fitting)
    assert sum(option.increase for option in chosen) == pytest.approx(best, rel=1e-5, abs=1e-6)


def test_many_layers_of_many_options_are_solved() -> None:
    layers = [
        [Option(cost=size * bits, increase=weight * 4.0**-bits) for bits in range(2, 9)]
        for size, weight in zip(range(1000, 1200), itertools.cycle((1.0, 30.0, 1000.0)))
    ]
    budget = sum(4 * size for size in range(1000, 1200))
    chosen = allocate(layers, budget)
    cost = sum(options[index].cost for options, index in zip(layers, chosen, strict=True))
    assert 0.999 * budget < cost <= budget
    uniform = sum(options[2].increase for options in layers)
    assert sum(options[i].increase for options, i in zip(layers, chosen, strict=True)) < uniform / 2


def test_no_layers_need_no_choice() -> None:
    assert allocate([], 0) == []
