"""Mistakes in shares of single layers, and in zeros beside units that are deleted."""

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
    prune: {method: taylor, layers: {fc1: {sparsity: 0.5}}, zeros: {layers: {fc1: {sparsity: 0.9}}}}
    finetune: {epochs: 3}
"""
AT = "10: recipes.small.prune"
DELETION = "method: taylor, layers: {fc1: {sparsity: 0.5}}"
MISTAKES = [
    (
        "{layers: {fc1: {sparsity: 0.9}}}",
        "{}",
        f"{AT}.zeros: does not say how much; add sparsity, such as 0.5, or layers",
    ),
    (
        "zeros: {layers",
        "zeros: {scope: global, layers",
        f"{AT}.zeros.layers: gives shares layer by layer, which scope global excludes; keep one of them",
    ),
    (
        "    finetune: {epochs: 3}\n",
        "",
        f"{AT}.zeros: grow during finetune, which is no step here; add finetune",
    ),
    (
        DELETION,
        "method: magnitude_unstructured, sparsity: 0.5",
        f"{AT}.zeros: grow beside units that are deleted, and magnitude_unstructured deletes none; delete it",
    ),
    (
        "taylor, ",
        "taylor, scope: global, sparsity: 0.5, ",
        f"{AT}.layers: gives shares layer by layer, which scope global excludes; keep one of them",
    ),
    (
        "taylor, ",
        "taylor, sparsity: 0.5, schedule: iterative, rounds: 2, ",
        f"{AT}.layers: has no rounds; delete it, or schedule: iterative",
    ),
    (
        "taylor, ",
        "gradient_stability, mean_threshold: 0.1, std_threshold: 0.1, ",
        f"{AT}.layers: gives shares, where thresholds tell what goes; keep one of them",
    ),
    (
        "{sparsity: 0.5}",
        "{sparsity: 1}",
        f"{AT}.layers.fc1.sparsity: should be less than 1",
    ),
    ("taylor, layers: {fc1: {sparsity: 0.5}}, ", "taylor, ", f"{AT}: does not say how much"),
]


@pytest.mark.parametrize(("old", "new", "line"), MISTAKES, ids=[new or old for old, new, _ in MISTAKES])
def test_a_mistake_is_told(old: str, new: str, line: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD.replace(old, new), "f")
    assert line in str(caught.value).replace("f:", "", 1)


def test_shares_are_part_of_the_recipe_and_no_part_of_others() -> None:
    (recipe,) = parse_spec(GOOD, "f").recipes.values()
    assert recipe.canonical()["prune"] == {
        "method": "taylor",
        "scope": "layer",
        "layers": {"fc1": {"sparsity": 0.5}},
        "zeros": {"scope": "layer", "ramp": 0.5, "interval": 32, "layers": {"fc1": {"sparsity": 0.9}}},
    }
    plain = GOOD.replace(
        DELETION + ", zeros: {layers: {fc1: {sparsity: 0.9}}}", "method: taylor, sparsity: 0.5"
    )
    assert parse_spec(plain, "f").recipes["small"].canonical()["prune"] == {
        "method": "taylor",
        "scope": "layer",
        "sparsity": 0.5,
    }
