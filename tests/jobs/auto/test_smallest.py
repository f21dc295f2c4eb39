"""What a search for few bytes proposes, trial by trial: pinned, because results were measured with just these."""

import hashlib
import json
from typing import Any

import pytest

from fleetpress.compression.joint_allocation import Deletion, Part
from fleetpress.jobs.auto.choices import Searched, Sensed, Table
from fleetpress.jobs.auto.joint import expected_of
from fleetpress.jobs.auto.search import Goal, Measured, propose

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


def _trial(family: Any, x: float, recipe: dict[str, Any]) -> Measured:
    """The trial of a model whose drop x and the family tell, and whose deletions cost half of what was expected."""
    drop = 0.0 if x > {"quantize": 0.11, "zero": 0.04, "joint": 0.03, "delete": 0.2}[family] else 0.02
    is_tuned = "finetune" in recipe
    expected = expected_of(recipe, TABLE) if is_tuned else {}
    return Measured(
        digest=f"{family}-{x:.6f}",
        family=family,
        x=x,
        recipe=recipe,
        before=0.9,
        after=0.9 - drop,
        drop=drop,
        standard_error=0.001,
        costs={"bytes": x * TABLE.float_bytes + 3000, "macs": 1000 * x},
        expected=expected,
        divergence=sum(expected.values()) - 0.5 * expected.get("deletion", 0.0),
    )


@pytest.mark.parametrize(
    ("goal", "places", "digest"),
    [
        (
            Goal(goal="smallest", cost="bytes", limit=0.01),
            "quantize:0.26 zero:0.05 joint:0.04 delete:0.6 joint:0.0248 zero:0.031 joint:0.01538 "
            "zero:0.01922 joint:0.0315 zero:0.03937 zero:0.04437 zero:0.03494",
            "0649046ce6935fdb",
        ),
        (
            Goal(goal="most_accurate", cost="bytes", budget=20_000),
            "quantize:0.09519 zero:0.09018 joint:0.09018 delete:0.6 zero:0.01343 delete:0.03464 "
            "zero:0.0348 delete:0.1442 zero:0.05602 delete:0.07067 zero:0.07108 joint:0.08317",
            "f2acec86392a9779",
        ),
    ],
)
def test_a_search_for_few_bytes_proposes_what_it_always_did(goal: Goal, places: str, digest: str) -> None:
    trials: list[Measured] = []
    for _ in range(3):
        trials += [_trial(*one) for one in propose(trials, goal, TABLE, SEARCHED, 4)]
    assert " ".join(f"{trial.family}:{trial.x:.4g}" for trial in trials) == places
    recipes = json.dumps([trial.recipe for trial in trials], sort_keys=True)
    assert hashlib.sha256(recipes.encode()).hexdigest()[:16] == digest
