"""`prune.structure`: a key only where it is given, in one order, with its mistakes told."""

import pytest

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.recipe import Recipe

SPEC = """\
version: 1
name: nightly
output: out
models: [{source: net.pt2, recipe: small}]
recipes:
  small:
    prune: {method: magnitude, sparsity: 0.5, structure: STRUCTURE}
    validate: {max_drop: 1}
"""


def recipe(structure: str) -> Recipe:
    return parse_spec(SPEC.replace("STRUCTURE", structure), "fleet.yaml").recipes["small"]


def test_it_is_a_key_only_where_it_is_given() -> None:
    assert "structure" not in recipe("[]").canonical()["prune"]
    assert recipe("Head").canonical()["prune"]["structure"] == ["head"]
    assert recipe("[normalized, head, normalized]").canonical()["prune"]["structure"] == [
        "head",
        "normalized",
    ]


@pytest.mark.parametrize(
    ("structure", "mistake"),
    [
        ("heads", "unknown structure `heads`; did you mean `head`?"),
        ("[head, head_dim]", "head and head_dim take the same layers apart; keep one of them"),
    ],
)
def test_mistakes(structure: str, mistake: str) -> None:
    with pytest.raises(SpecError) as caught:
        recipe(structure)
    assert str(caught.value) == f"fleet.yaml:7: recipes.small.prune.structure: {mistake}"
