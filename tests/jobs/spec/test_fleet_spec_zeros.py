"""Recipes that zero weights by their gradients: what they collect, and what has no meaning for them."""

import pytest

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec

GOOD = """\
version: 1
name: x
output: out
models: [{source: m.pt2, data: d, recipe: r}]
data: {d: {train: t.npz, loss: cross_entropy}}
recipes: {r: {STEPS}}
"""


def parsed(steps: str) -> Spec:
    return parse_spec(GOOD.replace("STEPS", steps), "f")


@pytest.mark.parametrize(
    ("steps", "collects"),
    [
        ("prune: {method: fisher_unstructured, sparsity: 0.5}", True),
        ("train: {epochs: 1}, prune: {method: fisher_unstructured, sparsity: 0.5}", True),
        ("train: {epochs: 1}, prune: {method: taylor_unstructured, pattern: 2:4}", True),
        ("train: {epochs: 1}, prune: {method: gradient_stability_unstructured, sparsity: 0.5}", False),
        ("prune: {method: gradient_stability_unstructured, sparsity: 0.5}", True),
        ("train: {epochs: 1}, prune: {method: fisher, sparsity: 0.5}", False),
        ("prune: {method: magnitude_unstructured, sparsity: 0.5}", False),
    ],
)
def test_an_expansion_collects_at_the_trained_weights(steps: str, collects: bool) -> None:
    assert (parsed(steps).recipes["r"].collect is not None) == collects


def test_a_share_of_all_may_be_normalized() -> None:
    steps = "prune: {method: fisher_unstructured, sparsity: 0.5, scope: global, normalize: mean}"
    prune = parsed(steps).recipes["r"].prune
    assert prune is not None
    assert (prune.scope, prune.normalize) == ("global", "mean")


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (
            "prune: {method: fisher_unstructured, pattern: 2:4, scope: global}",
            "prune.scope: global has no meaning for pattern 2:4, which tells what goes in every row; delete it",
        ),
        (
            "prune: {method: fisher_unstructured, sparsity: 0.5, normalize: mean}",
            "prune.normalize: mean has no meaning for scope layer, which compares no layers; delete it",
        ),
        (
            "prune: {method: magnitude_unstructured, sparsity: 0.5, scope: global, normalize: mean}",
            "prune.normalize: has no meaning for magnitude_unstructured, which deletes no units; delete it",
        ),
        (
            "prune: {method: taylor_unstructured, sparsity: 0.5, rounds: 3}",
            "prune.rounds: has no meaning for taylor_unstructured, which deletes no units; delete it",
        ),
        (
            "finetune: {epochs: 1}, prune: {method: taylor_unstructured, sparsity: 0.5, schedule: gradual}",
            "prune.schedule: gradual has no meaning for taylor_unstructured; delete it, or take magnitude_unstr",
        ),
    ],
)
def test_what_has_no_meaning_is_told(steps: str, line: str) -> None:
    with pytest.raises(SpecError) as caught:
        parsed(steps)
    assert line in str(caught.value)


def test_gradients_need_data() -> None:
    text = GOOD.replace("STEPS", "prune: {method: fisher_unstructured, sparsity: 0.5}")
    with pytest.raises(SpecError, match="recipe `r` needs it for prune by fisher_unstructured"):
        parse_spec(text.replace("data: d, ", ""), "f")
