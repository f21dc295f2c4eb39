"""One budget for several models: what each of them gets."""

from dataclasses import replace

import pytest

from fleetpress.jobs.auto.budget import Budget, Candidates, share
from fleetpress.jobs.auto.measured import Measured
from fleetpress.jobs.errors import ModelError


def trial(name: str, size: float, drop: float, before: float = 0.9) -> Measured:
    return Measured(
        digest=f"{name}-{size:g}",
        family="quantize",
        x=size / 1000,
        recipe={},
        before=before,
        after=before - drop,
        drop=drop,
        standard_error=0.0,
        costs={"bytes": size, "macs": 1.0},
    )


SENSITIVE = Candidates(
    trials=[trial("a", 100, 0.0), trial("a", 50, 0.009), trial("a", 10, 0.5)], max_drop=0.01
)
ROBUST = Candidates(
    trials=[trial("b", 100, 0.0), trial("b", 50, 0.001), trial("b", 20, 0.002)], max_drop=0.01
)


def sizes(budget: Budget) -> dict[str, float]:
    chosen = share(budget, {"sensitive": SENSITIVE, "robust": ROBUST})
    return {name: found.costs["bytes"] for name, found in chosen.items()}


def test_bytes_are_saved_where_they_cost_least() -> None:
    assert sizes(Budget(total_bytes=200)) == {"sensitive": 100, "robust": 100}
    assert sizes(Budget(total_bytes=150)) == {"sensitive": 100, "robust": 50}
    assert sizes(Budget(total_bytes=120)) == {"sensitive": 100, "robust": 20}
    assert sizes(Budget(total_bytes=90)) == {"sensitive": 50, "robust": 20}


def test_a_mean_drop_is_spent_where_it_saves_most() -> None:
    assert sizes(Budget(max_mean_drop=0.001)) == {"sensitive": 100, "robust": 20}
    assert sizes(Budget(max_mean_drop=0.0055)) == {"sensitive": 50, "robust": 20}
    assert sizes(Budget(max_mean_drop="0.1%")) == {"sensitive": 100, "robust": 50}  # of 0.9


def test_a_budget_that_nothing_fits_in_says_what_it_would_take() -> None:
    with pytest.raises(ModelError, match=r"costs 70 B, more than fleet.total_bytes 60 B"):
        sizes(Budget(total_bytes=60))


def test_no_model_gets_more_drop_than_its_own_recipe_accepts() -> None:
    strict = replace(ROBUST, max_drop=0.0015)
    assert share(Budget(total_bytes=10_000), {"m": strict})["m"].costs["bytes"] == 100
    assert share(Budget(max_mean_drop=1.0), {"m": strict})["m"].costs["bytes"] == 50


def test_models_without_a_good_trial_are_left_out() -> None:
    hopeless = Candidates(trials=[trial("c", 10, 0.5)], max_drop=0.01)
    assert share(Budget(total_bytes=100), {"hopeless": hopeless, "robust": ROBUST}).keys() == {"robust"}
    assert share(Budget(total_bytes=100), {"untried": Candidates(trials=[], max_drop=0.01)}) == {}
