"""Mistakes in the schedule and the compensation of `prune`: each is told with what to write instead."""

import pytest

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import parse_spec

GOOD = """\
version: 1
name: nightly
output: s3://compressed/nightly
models:
  - {name: lenet5, source: s3://models/model.pt2, data: mnist, recipe: small}
data:
  mnist: {train: s3://data/train.npz, eval: s3://data/test.npz, loss: cross_entropy}
recipes:
  small:
    prune: {method: taylor, sparsity: 0.5, schedule: iterative, rounds: 3, compensate: least_squares}
    finetune: {epochs: 3}
"""
AT = "10: recipes.small.prune"
MISTAKES = [
    (
        "epochs: 3",
        "epochs: 2",
        f"{AT}.rounds: 3 need as many epochs of finetune at least, and it has 2; take fewer rounds or more epochs",
    ),
    (
        "    finetune: {epochs: 3}\n",
        "",
        f"{AT}.schedule: iterative tunes after every round; add the step finetune",
    ),
    (
        "rounds: 3, ",
        "",
        f"{AT}.schedule: iterative does not say in how many rounds; add rounds, such as 3",
    ),
    (
        "schedule: iterative, ",
        "",
        f"{AT}.rounds: has no meaning for one shot; delete it, or add schedule: iterative",
    ),
    (
        "method: taylor, sparsity: 0.5",
        "mean_threshold: 1, std_threshold: 1",
        f"{AT}.schedule: iterative grows a share from round to round; give sparsity",
    ),
    (
        "rounds: 3",
        "rounds: 3, normalize: mean",
        f"{AT}.normalize: mean has no meaning for scope layer, which compares no layers; delete it",
    ),
    ("rounds: 3", "rounds: 1", f"{AT}.rounds: should be greater than or equal to 2, not 1"),
    (
        "compensate: least_squares",
        "compensate: least_square",
        f"{AT}.compensate: should be none or bias or least_squares, not 'least_square'",
    ),
    (
        "method: taylor, sparsity: 0.5, schedule: iterative, rounds: 3, compensate: least_squares",
        "method: magnitude_unstructured, sparsity: 0.5, compensate: bias",
        f"{AT}.compensate: has no meaning for magnitude_unstructured, which deletes no units; delete it",
    ),
    (
        "data: mnist, ",
        "",
        "5: models[0].data: is missing; recipe `small` needs it for finetune, prune's compensate; add one of: mnist",
    ),
]


@pytest.mark.parametrize(("old", "new", "line"), MISTAKES, ids=[new or old for old, new, _ in MISTAKES])
def test_a_mistake_is_told(old: str, new: str, line: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD.replace(old, new), "f")
    assert line in str(caught.value).replace("f:", "", 1)


def test_what_pruning_looks_at_is_calibrated_with_the_defaults() -> None:
    recipe = parse_spec(GOOD, "f").recipes["small"]
    assert recipe.calibrate is not None
    assert recipe.calibrate.samples == 512
    wanda = GOOD.replace("taylor", "wanda_structured").replace(", compensate: least_squares", "")
    assert parse_spec(wanda, "f").recipes["small"].calibrate is not None
    taylor = GOOD.replace(", compensate: least_squares", "")
    assert parse_spec(taylor, "f").recipes["small"].calibrate is None
