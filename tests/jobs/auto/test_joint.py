"""Candidates of the joint choice: their recipes, what was expected of them, what measurements do to the prices."""

import itertools
from dataclasses import replace

import pytest

from fleetpress.compression.joint_allocation import Deletion, Part
from fleetpress.jobs.auto.choices import UNCORRECTED, Prices, Searched, Sensed, Table
from fleetpress.jobs.auto.effort import effort
from fleetpress.jobs.auto.joint import corrected, expected_of, is_outdated, joint_recipe, place_of
from fleetpress.jobs.spec.checks import needs_gradients, needs_inputs, observes
from fleetpress.jobs.spec.recipe import Recipe


def _options(name: str, size: int, weight: float) -> list[Sensed]:
    """A layer's floats; codes of 4 and 2 bits; half and nine tenths of zeros beside 3 bits."""

    def one(bits: int, zeros: float, by_zeros: float) -> Sensed:
        return Sensed(
            layer=name,
            settings={"num_bits": bits, "strategy": "tensor"},
            bytes=round(size * (1 - zeros) * bits / 8 + (size / 12 if zeros else 0)),
            increase=weight * (4.0**-bits + by_zeros),
            is_trained=True,
            zeros=zeros,
            by_zeros=weight * by_zeros,
        )

    return [
        Sensed(layer=name, settings=None, bytes=4 * size, increase=0.0),
        *(one(*those) for those in ((4, 0.0, 0.0), (2, 0.0, 0.0), (3, 0.5, 0.01), (3, 0.9, 0.1))),
    ]


def _table(deletion: float) -> Table:
    return Table(
        layers={"in": _options("in", 40_000, 1.0), "out": _options("out", 4000, 10.0)},
        deletions={"in": [Deletion(share=0.0, increase=0.0), Deletion(share=0.5, increase=deletion)]},
        parts={
            "in": (Part(weight=1.0, axes=(("in", 1.0),)),),
            "out": (Part(weight=1.0, axes=(("in", 1.0),)),),
        },
    )


SEARCHED = Searched(epochs=2, method="gptq")


def test_a_recipe_is_one_that_a_spec_could_hold() -> None:
    recipe = joint_recipe(5000, _table(1e-6), SEARCHED, UNCORRECTED)
    assert recipe is not None
    assert recipe["prune"]["layers"] == {"in": {"sparsity": 0.5}}
    assert recipe["prune"]["zeros"]["layers"]["in"] == {"sparsity": 0.9}
    assert recipe["finetune"]["quantization_aware"]
    parsed = Recipe.model_validate(recipe)
    assert parsed.canonical()["prune"]["layers"] == recipe["prune"]["layers"]


def test_where_units_are_dear_weights_become_zero_instead() -> None:
    recipe = joint_recipe(9000, _table(1e6), SEARCHED, UNCORRECTED)
    assert recipe is not None
    assert recipe["prune"]["method"] == "magnitude_unstructured"
    assert recipe["prune"]["schedule"] == "gradual"
    assert "collect" not in recipe
    Recipe.model_validate(recipe)


def test_what_a_recipe_needs_to_know_is_collected_and_calibrated() -> None:
    """With zeros in every layer nothing does: found on a net where the solver chose them everywhere."""
    everywhere = 0
    for deletion, budget in itertools.product((1e-6, 0.05, 1e6), range(2000, 40_000, 500)):
        recipe = joint_recipe(budget, _table(deletion), SEARCHED, UNCORRECTED)
        if recipe is None:
            continue
        parsed = Recipe.model_validate(recipe)
        prune, quantize = parsed.prune, parsed.quantize
        assert quantize is not None
        assert "calibrate" in recipe or not (needs_inputs(quantize) or (prune and observes(prune))), recipe
        assert "collect" in recipe or not (prune and needs_gradients(prune)), recipe
        everywhere += "calibrate" not in recipe
    assert everywhere > 3


def test_there_is_no_recipe_below_the_cheapest_choice() -> None:
    assert joint_recipe(100, _table(1.0), SEARCHED, UNCORRECTED) is None


def test_what_was_expected_is_told_by_kind() -> None:
    table = _table(1e-6)
    recipe = joint_recipe(5000, table, SEARCHED, UNCORRECTED)
    assert recipe is not None
    expected = expected_of(recipe, table)
    assert expected["deletion"] == 1e-6
    zeros = {name: own["sparsity"] for name, own in recipe["prune"]["zeros"]["layers"].items()}
    taken = {
        name: next(
            one
            for one in options
            if one.settings is not None
            and recipe["quantize"]["layers"][name].items() >= one.settings.items()
            and one.zeros == zeros.get(name, 0.0)
        )
        for name, options in table.layers.items()
    }
    assert expected["zeros"] == pytest.approx(sum(0.5 * one.by_zeros for one in taken.values()))


def test_one_share_for_all_units_lies_between_those_that_were_sensed() -> None:
    recipe = {
        "prune": {"structure": ["channel"], "sparsity": 0.25},
        "quantize": {"num_bits": 4, "group_size": 64},
    }
    assert expected_of(recipe, _table(1.0)) == {"codes": 0.0, "zeros": 0.0, "deletion": pytest.approx(0.5)}
    together = {"prune": {"sparsity": 0.9}, "quantize": {"num_bits": 3, "strategy": "tensor"}}
    assert expected_of(together, _table(1.0)) == {}


def test_prices_are_those_that_explain_what_was_measured() -> None:
    assert corrected([]) == Prices()
    truth = Prices(codes=0.5, zeros=0.1, deletion=2.0)
    tried = [
        ({"codes": a, "zeros": b, "deletion": c}, truth.codes * a + truth.zeros * b + truth.deletion * c)
        for a, b, c in ((1.0, 0.1, 0.0), (0.1, 1.0, 0.1), (0.2, 0.3, 1.0), (0.0, 2.0, 0.1), (0.5, 0.5, 0.5))
    ]
    found = corrected(tried)
    assert found.deletion > found.codes > found.zeros > 0
    assert corrected([({"codes": 1.0, "zeros": 1.0, "deletion": 1.0}, 0.6)]) == Prices(
        codes=pytest.approx(0.2, rel=0.2),
        zeros=pytest.approx(0.2, rel=0.2),
        deletion=pytest.approx(0.2, rel=0.2),
        training=pytest.approx(0.0, abs=1e-9),
    )


def test_what_training_moves_by_itself_is_no_price() -> None:
    tried = [
        ({"codes": 0.04, "zeros": 0.02, "deletion": 0.05}, 0.033),
        ({"codes": 0.0002, "zeros": 0.0, "deletion": 0.0}, 0.0027),  # 8 bits: hardly anything was expected
    ]
    found = corrected(tried)
    assert 0.2 < found.codes < 0.5
    assert 0.2 < found.deletion < 0.5
    assert 0.001 < found.training < 0.0027


def test_the_place_of_a_loss_is_where_the_solver_expects_it() -> None:
    table, prices = _table(0.5), Prices(codes=2.0, zeros=1.5, training=1e-3)

    def total(x: float) -> float:
        recipe = joint_recipe(x * table.float_bytes, table, SEARCHED, prices)
        assert recipe is not None
        found = expected_of(recipe, table)
        return 2.0 * found["codes"] + 1.5 * found["zeros"] + found["deletion"] + 1e-3

    near = joint_recipe(0.06 * table.float_bytes, table, SEARCHED, prices)
    assert near is not None
    for loss in (0.3, 3.0):
        x = place_of(loss, near, table, SEARCHED, prices)
        assert x is not None
        assert total(x) <= loss * total(0.06) * (1 + 1e-9) < total(x / 1.1)
    assert place_of(1.0, near, table, SEARCHED, Prices(codes=0.0, zeros=0.0, deletion=0.0)) is None


def test_layers_that_nothing_reads_go_with_the_first_deletion() -> None:
    table = replace(_table(1e-6), idle=frozenset({"out"}))
    recipe = joint_recipe(5000, table, SEARCHED, UNCORRECTED)
    assert recipe is not None
    assert recipe["prune"]["layers"]
    assert recipe["quantize"]["targets"] == ["in"]
    assert set(recipe["prune"].get("zeros", {}).get("layers", {})) <= {"in"}
    kept = joint_recipe(18_000, replace(_table(1e6), idle=frozenset({"out"})), SEARCHED, Prices(zeros=1e6))
    assert kept is not None
    assert set(kept["quantize"]["targets"]) == {"in", "out"}


def test_without_zeros_training_starts_from_calibrated_codes() -> None:
    recipe = joint_recipe(18_000, _table(1e6), SEARCHED, Prices(zeros=1e6))
    assert recipe is not None
    assert "prune" not in recipe
    assert recipe["quantize"]["method"] == SEARCHED.method
    assert all("method" not in own for own in recipe["quantize"]["layers"].values())
    assert "calibrate" in recipe
    zeroed = joint_recipe(9000, _table(1e6), SEARCHED, UNCORRECTED)
    assert zeroed is not None
    zeros = set(zeroed["prune"]["targets"])
    own = {name for name, one in zeroed["quantize"]["layers"].items() if "method" in one}
    assert own == zeros
    assert ("calibrate" in zeroed) == (zeros != set(zeroed["quantize"]["layers"]))


def test_corrected_prices_change_the_choice() -> None:
    table = _table(0.05)
    plain = joint_recipe(9000, table, SEARCHED, UNCORRECTED)
    dear = joint_recipe(9000, table, SEARCHED, Prices(codes=1.0, zeros=1.0, deletion=1000.0))
    assert plain is not None
    assert dear is not None
    assert "zeros" in plain["prune"] or "layers" in plain["prune"]
    assert plain["prune"]["method"] != dear["prune"]["method"]


def test_a_candidate_is_outdated_once_the_solver_would_do_much_better() -> None:
    table, dear = _table(0.5), Prices(codes=1.0, zeros=1.0, deletion=0.001)
    recipe = joint_recipe(9000, table, SEARCHED, UNCORRECTED)
    assert recipe is not None
    assert not is_outdated(recipe, 9000, table, SEARCHED, UNCORRECTED)
    assert is_outdated(recipe, 9000, table, SEARCHED, dear)


def test_small_nets_on_few_samples_get_many_epochs_and_folds() -> None:
    small = effort(1000, 50_000, folds=4, epochs=None)
    large = effort(300_000, 2_000_000, folds=4, epochs=None)
    assert small.epochs > 10
    assert small.folds > 1
    assert (large.epochs, large.folds) == (1, 1)
    assert effort(1000, 50_000, folds=4, epochs=3).epochs == 3
    assert effort(2000, 40_000_000, folds=4, epochs=None).epochs == 2
    assert effort(2000, 400_000_000, folds=4, epochs=None).epochs == 1


def test_zeros_grow_where_there_are_steps_to_mend_what_they_cost() -> None:
    assert effort(2000, 40_000_000, folds=4, epochs=None).grows
    assert not effort(400, 1_000_000_000, folds=4, epochs=None).grows
    assert effort(400, 1_000_000_000, folds=4, epochs=4).grows
    assert not effort(2000, 40_000_000, folds=4, epochs=0).grows
