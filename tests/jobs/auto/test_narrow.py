"""Candidates with few operations: their recipes, what measurements do to the prices, where a search goes."""

import itertools
import math

import pytest

from fleetpress.compression.joint_allocation import Deletion, LayerChoice, Part
from fleetpress.compression.unit_operations import Operations
from fleetpress.jobs.auto.candidates import recipe_of
from fleetpress.jobs.auto.choices import UNCORRECTED, Prices, Searched, Table
from fleetpress.jobs.auto.measured import Goal, Measured, is_good, ranked
from fleetpress.jobs.auto.narrow import (
    corrected_by_group,
    expected_by_group,
    is_narrow_outdated,
    narrow_recipe,
)
from fleetpress.jobs.auto.search import propose
from fleetpress.jobs.spec.recipe import Recipe

SEARCHED = Searched(epochs=2, method="gptq")
FASTEST = Goal(goal="fastest", cost="macs", limit=0.01)


def _chain(**prices: float) -> Table:
    """A net of three layers: units of `a` between the first two, of `b` between the last two."""
    axes = {"one": (("a", 1.0),), "two": (("b", 1.0), ("a", 1.0)), "three": (("b", 1.0),)}
    macs = {"one": 4000, "two": 10_000, "three": 1000}
    return Table(
        layers={},
        narrowings={
            name: [
                Deletion(share=share, increase=price * (math.exp(8 * share) - 1) / 1000)
                for share in (0.0, 0.25, 0.5, 0.75, 0.9)
            ]
            for name, price in prices.items()
        },
        operations=[Operations(macs=macs[name], parts=(Part(weight=1.0, axes=axes[name]),)) for name in axes],
    )


def _shares(recipe: dict[str, object] | None) -> dict[str, float]:
    assert recipe is not None
    return {name: own["sparsity"] for name, own in recipe["prune"]["layers"].items()}  # type: ignore[index]


def _left(table: Table, shares: dict[str, float]) -> float:
    return sum(one.macs * LayerChoice(options=(), parts=one.parts).left(shares) for one in table.operations)


@pytest.mark.parametrize("part", [0.7, 0.5, 0.3, 0.1])
def test_no_other_shares_within_the_operations_lose_less(part: float) -> None:
    table = _chain(a=1.0, b=0.2)
    budget = part * table.macs
    found = narrow_recipe(budget, table, SEARCHED, UNCORRECTED)
    assert _left(table, _shares(found)) <= budget
    assert found is not None
    best = min(
        sum(one.increase for one in chosen)
        for chosen in itertools.product(*table.narrowings.values())
        if _left(table, {name: one.share for name, one in zip("ab", chosen, strict=True)}) <= budget
    )
    assert sum(expected_by_group(found, table).values()) == pytest.approx(best, rel=1e-3)


def test_a_recipe_is_one_that_a_spec_could_hold_and_keeps_eight_bits() -> None:
    for epochs in (0, 2):
        searched = Searched(epochs=epochs, method="gptq")
        recipe = recipe_of("narrow", 0.5, _chain(a=1.0, b=1.0), searched)
        assert recipe is not None
        assert ("finetune" in recipe) == bool(epochs)
        parsed = Recipe.model_validate(recipe).canonical()
        assert parsed["quantize"]["num_bits"] == 8
        assert parsed["prune"]["method"] == "fisher"
    deleted = recipe_of("delete", 0.5, _chain(a=1.0, b=1.0), SEARCHED)
    assert deleted is not None
    assert deleted["quantize"]["num_bits"] == 8


def test_there_is_no_recipe_where_no_unit_can_go_or_not_so_many() -> None:
    assert narrow_recipe(1.0, _chain(a=1.0, b=1.0), SEARCHED, UNCORRECTED) is None
    assert narrow_recipe(5000, Table(layers={}), SEARCHED, UNCORRECTED) is None


def test_groups_that_lost_more_than_was_expected_are_spared() -> None:
    table = _chain(a=1.0, b=1.0)
    tried = [
        ({"a": 1.0, "b": 0.1}, 1.2),
        ({"a": 0.1, "b": 1.0}, 0.2),
        ({"a": 0.5, "b": 0.5}, 0.7),
    ]
    prices = corrected_by_group(tried)
    assert prices.groups["a"] > 2 * prices.groups["b"] > 0
    before, after = (_shares(narrow_recipe(4000, table, SEARCHED, one)) for one in (UNCORRECTED, prices))
    assert after.get("a", 0.0) < before["a"]
    wrong = narrow_recipe(4000, table, SEARCHED, UNCORRECTED)
    assert wrong is not None
    assert is_narrow_outdated(wrong, 4000, table, SEARCHED, prices)
    assert not is_narrow_outdated(wrong, 4000, table, SEARCHED, UNCORRECTED)


def test_nothing_is_corrected_by_what_was_not_measured() -> None:
    assert corrected_by_group([]) == Prices()
    assert corrected_by_group([({"a": 0.0}, 1.0), ({"a": 1.0}, math.nan)]) == Prices()
    everywhere = {"prune": {"structure": ["channel"], "sparsity": 0.25}}
    assert expected_by_group(everywhere, _chain(a=1.0, b=1.0)) == {}


def _searched(goal: Goal, rounds: int, worth: float, overhead: float = 0.0) -> list[Measured]:
    """Trials of a net whose drop is what was expected of its narrowings, and `worth` times that of `delete`."""
    table, found = _chain(a=1.0, b=0.3), []
    for _ in range(rounds):
        for family, x, recipe in propose(found, goal, table, SEARCHED, 4):
            step = recipe["prune"]
            own = {name: {"sparsity": step.get("sparsity", 0.0)} for name in "ab"} | step.get("layers", {})
            lost = sum(expected_by_group({"prune": {"layers": own}}, table).values())
            macs = _left(table, {name: one["sparsity"] for name, one in own.items()})
            drop = 0.02 * lost * (worth if family == "delete" else 1.0)
            costs = {"bytes": 1.0, "macs": macs, "latency_ms": overhead + macs / 1000}
            found.append(
                Measured(
                    digest=f"{family}-{x}",
                    family=family,
                    x=x,
                    recipe=recipe,
                    before=0.9,
                    after=0.9 - drop,
                    drop=drop,
                    standard_error=0.0,
                    costs=costs,
                    divergence=lost,
                )
            )
    return found


def test_the_fewest_operations_within_the_drop_are_found() -> None:
    trials = _searched(FASTEST, 4, worth=2.0)
    best = ranked(trials, FASTEST)[0]
    assert best.family == "narrow"
    table = _chain(a=1.0, b=0.3)
    least = min(
        _left(table, {name: one.share for name, one in zip("ab", chosen, strict=True)})
        for chosen in itertools.product(*table.narrowings.values())
        if 0.02 * sum(one.increase for one in chosen) <= 0.01
    )
    assert best.costs["macs"] <= 1.1 * least
    assert sum(trial.family == "delete" for trial in trials) < 4


def test_one_share_everywhere_is_searched_on_while_it_wins() -> None:
    trials = _searched(FASTEST, 4, worth=0.01)
    assert ranked(trials, FASTEST)[0].family == "delete"
    assert sum(trial.family == "delete" for trial in trials) > 4


def test_half_of_the_operations_are_used_up_and_kept() -> None:
    table = _chain(a=1.0, b=0.3)
    goal = Goal(goal="most_accurate", cost="macs", budget=0.5 * table.macs, share=0.5)
    trials = _searched(goal, 3, worth=3.0)
    best = ranked(trials, goal)[0]
    assert is_good(best, goal)
    assert best.family == "narrow"
    assert best.recipe == narrow_recipe(0.5 * table.macs, table, SEARCHED, UNCORRECTED)
    assert sum(trial.family == "delete" for trial in trials) == 1


def test_a_time_is_met_by_what_the_measured_ones_tell() -> None:
    """Four milliseconds of eleven do not shrink with the operations; no one says so beforehand."""
    goal = Goal(goal="most_accurate", cost="latency_ms", budget=9.0)
    trials = _searched(goal, 2, worth=3.0, overhead=4.0)
    best = ranked(trials, goal)[0]
    assert best.family == "narrow"
    assert 7.5 < best.costs["latency_ms"] <= 9.0
