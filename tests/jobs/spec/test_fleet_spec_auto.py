"""`auto` in a spec: goals, budgets, and what does not go with them."""

import pytest

from fleetpress.compression.losses import LOSSES
from fleetpress.compression.metrics import METRICS, default_metric
from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.auto_checks import OTHERWISE, SHARES
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.recipe import AutoStep, Recipe

_SPEC = """
version: 1
name: chosen
output: out
models: [{{source: net.pt2, data: digits, recipe: best}}]
data: {{digits: {{train: train.npz, eval: eval.npz{data}}}}}
recipes:
  best: {recipe}
{more}
"""


def _recipe(recipe: str, more: str = "", data: str = "") -> Recipe:
    return parse_spec(_SPEC.format(recipe=recipe, more=more, data=data), "spec.yaml").recipes["best"]


def _auto(options: str) -> AutoStep:
    auto = _recipe(f"{{auto: {options}}}").auto
    assert auto is not None
    return auto


@pytest.mark.parametrize(
    ("options", "goal"),
    [
        ("{}", "smallest"),
        ("{max_drop: 1%}", "smallest"),
        ("{macs: 0.5}", "most_accurate"),
        ("{size_bytes: 262144}", "most_accurate"),
        ("{goal: fastest}", "fastest"),
    ],
)
def test_what_is_bounded_tells_the_goal(options: str, goal: str) -> None:
    assert _auto(options).goal == goal


def test_sizes_have_units() -> None:
    assert _auto("{size_bytes: 256KiB}") == _auto("{goal: most_accurate, size_bytes: 262144}")


def test_the_accepted_drop_is_that_of_the_gate() -> None:
    assert _recipe("{auto: {max_drop: 2%}}").validation.max_drop == "2%"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{auto: {goal: most_accurate}}", "recipes.best.auto: most_accurate within which budget"),
        ("{auto: {goal: smallest, macs: 0.5}}", "recipes.best.auto.macs: is a budget"),
        ("{auto: {macs: 0.5, size_bytes: 1MB}}", "excludes size_bytes; keep one budget"),
        ("{auto: {macs: 0.5, max_drop: 1%}}", "recipes.best.auto.max_drop: bounds smallest"),
        ("{auto: {}, quantize: {scheme: W4A16}}", "recipes.best.quantize: is chosen by auto"),
        ("{auto: {max_drop: 1%}, validate: {max_drop: 2%}}", "contradicts auto's 1%"),
        ("{auto: {goal: smalest}}", "did you mean `smallest`"),
    ],
)
def test_mistakes_are_told_with_their_path(recipe: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        _recipe(recipe)


@pytest.mark.parametrize("recipe", ["{auto: {max_drop: 1}}", "{auto: {goal: fastest, max_drop: 100%}}"])
@pytest.mark.parametrize(
    "data", ["", ", metric: cosine", ", loss: cross_entropy", ", loss: mse, metric: agreement"]
)
def test_a_drop_that_leaves_nothing_of_the_metric_is_no_bound(recipe: str, data: str) -> None:
    with pytest.raises(
        SpecError, match=r"spec.yaml:8: recipes.best.auto.max_drop: 1(00%)? accepts a model without"
    ):
        _recipe(recipe, data=data)


def test_which_metrics_are_shares_of_one_is_what_the_metrics_say() -> None:
    assert METRICS.keys() - set(SHARES) == {"perplexity", "mse", "psnr"}
    assert {loss for loss in LOSSES if default_metric(loss, "logits") not in SHARES} == set(OTHERWISE)


def test_it_is_told_where_it_was_written() -> None:
    with pytest.raises(
        SpecError, match=r"recipes.best.validate.max_drop: 1 accepts a model without any accuracy"
    ):
        _recipe("{auto: {}, validate: {max_drop: 1}}")


@pytest.mark.parametrize(
    ("recipe", "data"),
    [
        ("{auto: {max_drop: 1}}", ", metric: perplexity"),
        ("{auto: {max_drop: 1}}", ", loss: causal_lm"),
        ("{auto: {max_drop: 99%}}", ""),
        ("{auto: {macs: 0.5}, validate: {max_drop: 1}}", ""),
    ],
)
def test_large_drops_that_bound_something_are_accepted(recipe: str, data: str) -> None:
    assert _recipe(recipe, data=data).auto is not None


def test_a_fleet_has_one_budget() -> None:
    with pytest.raises(SpecError, match="either total_bytes or max_mean_drop"):
        _recipe("{auto: {}}", "fleet: {total_bytes: 1MB, max_mean_drop: 1%}")
