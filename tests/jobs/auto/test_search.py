"""What a search tries next, on families whose truth is known."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from fleetpress.jobs.auto.candidates import recipe_of
from fleetpress.jobs.auto.choices import Searched, Sensed, Table
from fleetpress.jobs.auto.measured import Goal, Measured, is_good, measured_in, ranked
from fleetpress.jobs.auto.search import propose

TABLE = Table(
    layers={
        name: [
            Sensed(layer=name, settings=None, bytes=4 * size, increase=0.0),
            *(
                Sensed(
                    layer=name,
                    settings={"num_bits": bits},
                    bytes=size * bits // 8,
                    increase=weight * 4.0**-bits,
                )
                for bits in (8, 6, 5, 4, 3, 2)
            ),
        ]
        for name, size, weight in (("a", 8000, 1.0), ("b", 80000, 0.01), ("c", 800, 100.0))
    }
)
SEARCHED = Searched(epochs=2, method="smallest_error")
SMALLEST = Goal(goal="smallest", cost="bytes", limit=0.01)


def measured(family: str, x: float, recipe: dict[str, object], drop: float, cost: float) -> Measured:
    return Measured(
        digest=f"{family}-{x:.6f}",
        family=family,  # type: ignore[arg-type]
        x=x,
        recipe=recipe,
        before=0.9,
        after=0.9 - drop,
        drop=drop,
        standard_error=0.001,
        costs={"bytes": cost, "macs": 1000 * x},
    )


def searched(goal: Goal, truth: Callable[[str, float], float], rounds: int) -> list[Measured]:
    """All trials of a search in which x tells the drop, and bytes are x of the weights and a graph of 3000."""
    found: list[Measured] = []
    for _ in range(rounds):
        found += [
            measured(family, x, recipe, truth(family, x), x * TABLE.float_bytes + 3000)
            for family, x, recipe in propose(found, goal, TABLE, SEARCHED, 4)
        ]
    return found


def test_a_search_begins_at_the_same_bits_whatever_floats_the_weights_are() -> None:
    """Half of the bytes before: twice the share."""
    half = Table(
        layers={
            name: [replace(one, bytes=one.bytes if one.settings else one.bytes // 2) for one in some]
            for name, some in TABLE.layers.items()
        }
    )
    single = propose([], SMALLEST, TABLE, SEARCHED, 12)
    other = propose([], SMALLEST, half, replace(SEARCHED, float_bits=16.0), 12)
    bytes_of = [
        {(family, round(x * table.float_bytes)) for family, x, _ in found if family != "delete"}
        for found, table in ((single, TABLE), (other, half))
    ]
    assert bytes_of[0] == bytes_of[1]
    zeroed = [[recipe for family, _, recipe in found if family == "zero"] for found in (single, other)]
    assert zeroed[0] == zeroed[1] != []


@pytest.mark.parametrize("edge", [0.02, 0.09, 0.15, 0.3])
def test_the_edge_of_what_is_good_enough_is_found(edge: float) -> None:
    trials = searched(SMALLEST, lambda family, x: 0.0 if family == "delete" and x >= edge else 0.05, 6)
    best = ranked(trials, SMALLEST)[0]
    assert is_good(best, SMALLEST)
    assert edge <= best.x <= 1.25 * edge


def test_families_that_are_no_good_do_not_stop_the_others() -> None:
    trials = searched(SMALLEST, lambda family, x: 0.0 if family == "quantize" and x >= 0.08 else 1.0, 4)
    assert ranked(trials, SMALLEST)[0].family == "quantize"


def _rounded(others: list[Measured]) -> list[float]:
    """Where rounding alone is tried next, after it took 95 kB, for nothing, and something else took less."""
    trials = [measured("quantize", 0.26, {"bits": 8}, 0.0, 95_000), *others]
    return [x for family, x, _ in propose(trials, SMALLEST, TABLE, SEARCHED, 8) if family == "quantize"]


def test_rounding_alone_leaps_below_what_is_good_already() -> None:
    """The last bits cost a trained net little in some nets, and step by step the search would never get there."""
    trained = measured("zero", 0.08, {"tuned": 1}, 0.001, 30_000)
    (leap, *_) = _rounded([trained])
    assert leap == pytest.approx(0.7 * 0.26 * 30 / 95)
    lost = measured("quantize", leap, {"bits": 2}, 0.05, 24_000)
    between = _rounded([trained, lost])
    assert between
    assert all(leap < x < leap / 0.7 for x in between)
    assert not _rounded([trained, measured("quantize", leap, {"bits": 2}, 0.05, 29_000)])


def test_rounding_alone_is_left_where_it_cannot_come_to_so_little() -> None:
    least = TABLE.least_bytes
    assert _rounded([measured("zero", 0.08, {"tuned": 1}, 0.001, 1.1 * least)])
    assert not _rounded([measured("zero", 0.05, {"tuned": 1}, 0.001, 0.9 * least)])


def test_a_family_that_cannot_be_built_is_left() -> None:
    (opening, *_) = propose([], SMALLEST, TABLE, SEARCHED, 1)
    facts = {"family": "delete", "x": 0.6, "recipe": {}, "refused": "no unit can be deleted"}
    (refused,) = measured_in("d", facts)
    first = measured(opening[0], opening[1], opening[2], 0.0, 40_000)
    families = {family for family, _, _ in propose([refused, first], SMALLEST, TABLE, SEARCHED, 8)}
    assert "delete" not in families
    assert "quantize" in families


def test_zeros_are_not_tried_where_there_is_no_time_for_them_to_grow() -> None:
    families = [
        {family for family, _, _ in propose([], SMALLEST, TABLE, replace(SEARCHED, grows=grows), 8)}
        for grows in (True, False)
    ]
    assert families[0] - families[1] == {"zero"}


def test_a_budget_is_used_up_and_kept() -> None:
    budget = 0.11 * TABLE.float_bytes
    goal = Goal(goal="most_accurate", cost="bytes", budget=budget)
    trials = searched(goal, lambda _, x: 0.01 / x, 3)
    best = ranked(trials, goal)[0]
    assert 0.93 * budget < best.costs["bytes"] <= budget


def test_no_recipe_is_tried_twice() -> None:
    trials = searched(SMALLEST, lambda _, x: 0.0 if x > 0.1 else 1.0, 8)
    recipes = [trial.recipe for trial in trials]
    assert all(recipe not in recipes[:index] for index, recipe in enumerate(recipes))


def test_every_round_is_the_same_for_all_its_trials() -> None:
    """Each trial asks for as many candidates as it needs to find its own: the first ones must not depend on that."""
    trials = searched(SMALLEST, lambda _, x: 0.0 if x > 0.12 else 1.0, 1)
    four = propose(trials, SMALLEST, TABLE, SEARCHED, 4)
    assert [
        propose(trials, SMALLEST, TABLE, SEARCHED, count + 1)[count] for count in range(len(four))
    ] == four


def test_sensitive_layers_get_more_bits() -> None:
    recipe = recipe_of("quantize", 0.1, TABLE, SEARCHED)
    assert recipe is not None
    bits = {name: own["num_bits"] for name, own in recipe["quantize"]["layers"].items()}
    assert "c" not in bits  # so small and so sensitive that it stays as it is
    assert bits["a"] > bits["b"]
    assert sorted(bits) == recipe["quantize"]["targets"]
