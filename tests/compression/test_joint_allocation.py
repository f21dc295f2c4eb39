"""Options and deletions chosen together, against trying all of them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.compression.allocation import Option
from fleetpress.compression.errors import MethodError
from fleetpress.compression.joint_allocation import Deletion, LayerChoice, Part, allocate_jointly

_OPTIONS = st.lists(
    st.builds(Option, cost=st.integers(1, 50).map(float), increase=st.integers(0, 100).map(float)),
    min_size=1,
    max_size=3,
)
_DELETIONS = st.lists(
    st.builds(Deletion, share=st.sampled_from((0.25, 0.5, 0.75)), increase=st.integers(0, 100).map(float)),
    max_size=2,
).map(lambda some: [Deletion(share=0.0, increase=0.0), *some])
# A chain as most nets are: the first layer writes what the second reads, and so on; the last one writes none of them.
_CHAIN = ((("a", 1.0),), (("b", 1.0), ("a", 0.5)), (("b", 1.0),))


@settings(max_examples=25, deadline=None)
@given(st.tuples(_OPTIONS, _OPTIONS, _OPTIONS), st.tuples(_DELETIONS, _DELETIONS), st.integers(1, 120))
def test_no_other_choice_within_the_budget_is_better(
    options: tuple[list[Option], ...], deletions: tuple[list[Deletion], ...], budget: int
) -> None:
    layers = [
        LayerChoice(options=own, parts=(Part(weight=1.0, axes=axes),))
        for own, axes in zip(options, _CHAIN, strict=True)
    ]
    groups = dict(zip("ab", deletions, strict=True))
    best = None
    for gone in itertools.product(*(range(len(some)) for some in deletions)):
        shares = {name: groups[name][index].share for name, index in zip("ab", gone, strict=True)}
        left = [layer.left(shares) for layer in layers]
        lost = sum(groups[name][index].increase for name, index in zip("ab", gone, strict=True))
        for chosen in itertools.product(*options):
            cost = sum(kept * one.cost for kept, one in zip(left, chosen, strict=True))
            whole = lost + sum(kept * one.increase for kept, one in zip(left, chosen, strict=True))
            if cost <= budget and (best is None or whole < best):
                best = whole
    if best is None:
        with pytest.raises(MethodError, match="more than the budget"):
            allocate_jointly(layers, groups, budget)
        return
    found = allocate_jointly(layers, groups, budget)
    assert found.cost <= budget
    assert found.increase == pytest.approx(best, rel=1e-3, abs=1e-3)


def test_a_layer_that_reads_and_writes_the_same_units_shrinks_with_the_square() -> None:
    layer = LayerChoice(
        options=[Option(cost=100, increase=1.0)],
        parts=(Part(weight=0.5, axes=(("h", 1.0), ("h", 1.0))), Part(weight=0.5, axes=(("h", 0.5),))),
    )
    assert layer.groups == ("h",)
    assert layer.left({"h": 0.5}) == pytest.approx(0.5 * 0.25 + 0.5 * 0.75)
    assert layer.left({}) == 1.0


def test_a_group_that_is_chosen_last_keeps_its_units_until_then() -> None:
    """Of a layer with three groups two are chosen together with its options; what the third saves is not counted on."""
    axes = tuple((name, 1.0) for name in "abc")
    layers = [LayerChoice(options=[Option(cost=64, increase=0.0)], parts=(Part(weight=1.0, axes=axes),))]
    groups = {
        name: [Deletion(share=0.0, increase=0.0), Deletion(share=0.5, increase=cost)]
        for name, cost in (("a", 2.0), ("b", 2.0), ("c", 1.0))
    }
    found = allocate_jointly(layers, groups, 16)
    assert found.cost <= 16
    assert found.deletions["a"] == found.deletions["b"] == 1
