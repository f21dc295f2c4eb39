"""Where a search for few bytes, or within a budget of bytes, arrives after three rounds of trials."""

from typing import Any

from fleetpress.compression.joint_allocation import Deletion, Part
from fleetpress.jobs.auto.choices import Prices, Searched, Sensed, Table
from fleetpress.jobs.auto.joint import expected_of, joint_recipe
from fleetpress.jobs.auto.measured import Goal, Measured, ranked
from fleetpress.jobs.auto.search import propose

SEARCHED = Searched(epochs=2, method="gptq")


def _layer(name: str, size: int, weight: float) -> list[Sensed]:
    plain = [
        Sensed(
            layer=name,
            settings={"num_bits": bits, "strategy": "channel"},
            bytes=size * bits // 8,
            increase=weight * 4.0**-bits,
        )
        for bits in (8, 5, 4, 3, 2)
    ]
    trained = [
        Sensed(
            layer=name,
            settings={"num_bits": bits, "strategy": "tensor"},
            bytes=round(size * (1 - zeros) * bits / 8 + (size / 12 if zeros else 0)),
            increase=weight * (4.0**-bits + by_zeros),
            is_trained=True,
            zeros=zeros,
            by_zeros=weight * by_zeros,
        )
        for bits, zeros, by_zeros in ((4, 0.0, 0.0), (2, 0.0, 0.0), (3, 0.5, 0.01), (3, 0.9, 0.1))
    ]
    return [Sensed(layer=name, settings=None, bytes=4 * size, increase=0.0), *plain, *trained]


TABLE = Table(
    layers={
        "in": _layer("in", 40_000, 1.0),
        "mid": _layer("mid", 9000, 3.0),
        "out": _layer("out", 900, 10.0),
    },
    deletions={
        name: [Deletion(share=share, increase=weight * share**3) for share in (0.0, 0.3, 0.87)]
        for name, weight in (("in", 0.02), ("mid", 0.3))
    },
    parts={
        "in": (Part(weight=1.0, axes=(("in", 1.0),)),),
        "mid": (Part(weight=1.0, axes=(("mid", 1.0), ("in", 1.0))),),
        "out": (Part(weight=1.0, axes=(("mid", 1.0),)),),
    },
)


TRUTH = Prices(codes=0.2, zeros=0.4, deletion=1.5, training=0.002)
LIMIT = 0.01


def _loss(recipe: dict[str, Any]) -> float:
    """What a candidate of the joint choice really loses: at other prices than were sensed, and what training moves."""
    expected = expected_of(recipe, TABLE)
    told = TRUTH.codes * expected["codes"] + TRUTH.zeros * expected["zeros"]
    return 0.5 * (told + TRUTH.deletion * expected["deletion"] + TRUTH.training)


def _trial(family: Any, x: float, recipe: dict[str, Any]) -> Measured:
    """The trial of a model that other families cannot make smaller than a twelfth."""
    is_joint = family == "joint"
    drop = _loss(recipe) if is_joint else 0.0 if x > 0.11 else 0.05
    return Measured(
        digest=f"{family}-{x:.6f}",
        family=family,
        x=x,
        recipe=recipe,
        before=0.9,
        after=0.9 - drop,
        drop=drop,
        standard_error=0.0001,
        costs={"bytes": x * TABLE.float_bytes + 3000, "macs": 1000 * x},
        expected=expected_of(recipe, TABLE) if is_joint else {},
        divergence=2 * drop if is_joint else 0.0,
    )


def test_a_search_for_few_bytes_comes_near_the_edge_within_three_rounds() -> None:
    places = [0.2 * 0.97**step for step in range(150)]
    recipes = [joint_recipe(x * TABLE.float_bytes, TABLE, SEARCHED, TRUTH) for x in places]
    edge = min(
        x for x, recipe in zip(places, recipes, strict=True) if recipe and _loss(recipe) + 0.0001 <= LIMIT
    )
    goal, trials = Goal(goal="smallest", cost="bytes", limit=LIMIT), list[Measured]()
    for _ in range(3):
        trials += [_trial(*one) for one in propose(trials, goal, TABLE, SEARCHED, 4)]
    assert edge <= ranked(trials, goal)[0].x < 1.25 * edge
    assert ranked(trials, goal)[0].family == "joint"


def test_a_search_for_few_bytes_uses_most_of_a_budget() -> None:
    goal, trials = Goal(goal="most_accurate", cost="bytes", budget=20_000), list[Measured]()
    for _ in range(3):
        trials += [_trial(*one) for one in propose(trials, goal, TABLE, SEARCHED, 4)]
    best = ranked(trials, goal)[0]
    assert best.family == "joint"
    assert 0.9 * 20_000 < best.costs["bytes"] <= 20_000
