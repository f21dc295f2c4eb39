"""Drawings of searches: what is drawn where, and that nothing a file may hold breaks the page."""

from typing import Any

import pytest

from fleetpress.jobs.report.searches import searches


def told(**changes: Any) -> dict[str, Any]:
    trials = [
        {"family": "quantize", "x": 0.2, "bytes": 4000, "macs": 10, "drop": 0.0, "standard_error": 0.0},
        {"family": "quantize", "x": 0.1, "bytes": 2000, "macs": 10, "drop": 0.01, "standard_error": 0.001},
        {"family": "delete", "x": 0.1, "bytes": 1000, "macs": 5, "drop": 0.04, "standard_error": 0.002},
    ]
    for index, trial in enumerate(trials):
        trial |= {"is_good": index < 2, "on_front": True, "is_chosen": index == 1}
    recipe = {"quantize": {"num_bits": 8, "layers": {"a": {"num_bits": 3}, "b": {"num_bits": 6}}}}
    search = {"goal": "smallest", "cost": "bytes", "limit": 0.02, "budget": None, "recipe": recipe}
    return {"search": {**search, "trials": trials, "backed_off": [], **changes}}


def test_smaller_is_further_left_and_worse_is_higher() -> None:
    (found,) = searches({"net": told()})
    assert [dot.look for dot in found.dots] == ["kept", "chosen", "missed"]
    assert found.dots[0].x > found.dots[1].x > found.dots[2].x
    assert found.dots[0].y < found.dots[1].y < found.dots[2].y
    assert found.limit is not None
    assert found.dots[1].y < found.limit < found.dots[2].y
    assert len(found.line) == 2
    assert found.steps == "quantize to 3 to 6 bits, layer by layer"


def test_what_was_backed_off_from_is_told_with_its_reason() -> None:
    tried = {"prune": {"method": "magnitude", "sparsity": 0.5}, "quantize": {"scheme": "W4A16"}}
    (found,) = searches({"net": told(backed_off=[{"recipe": tried, "why": "too much was lost"}])})
    assert found.backed_off == [("prune by magnitude, 0.5, quantize to W4A16", "too much was lost")]


def test_what_is_the_same_in_all_layers_is_told_once() -> None:
    recipe = {
        "prune": {"method": "fisher", "layers": {"a": {"sparsity": 0.5}}},
        "quantize": {"layers": {"a": {"num_bits": 8}, "b": {"num_bits": 8}}},
    }
    (found,) = searches({"net": told(recipe=recipe)})
    assert found.steps == "prune by fisher, 0.5, layer by layer, quantize to 8 bits, layer by layer"


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"search": None},
        {"search": {"trials": []}},
        told(cost="dollars"),
        told(trials=[{"bytes": "many", "drop": 0}, {"bytes": 0, "drop": 0}, 7]),
    ],
)
def test_what_is_no_search_is_not_drawn(metrics: dict[str, Any]) -> None:
    assert searches({"net": metrics}) == []


def test_a_single_trial_is_drawn() -> None:
    (found,) = searches({"net": told(trials=told()["search"]["trials"][:1], limit=None, budget=500.0)})
    assert len(found.dots) == 1
    assert found.budget is not None
