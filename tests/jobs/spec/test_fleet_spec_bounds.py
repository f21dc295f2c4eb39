"""Specs of endless files, endless numbers and endless mistakes: refused early, in words of some length."""

from pathlib import Path

import pytest

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import load_spec, parse_spec
from fleetpress.storage.store import open_store

HUGE = 10**400
SPEC = """\
version: 1
name: nightly
output: s3://compressed/nightly
models:
  - {name: a, source: s3://models/a.pt, recipe: r, data: d, factory: "a:b", inputs: {x: {shape: [1]}}}
data:
  d: {train: s3://data/a.npz, eval: s3://data/b.npz}
recipes:
  r:
    train: {epochs: 1}
    validate: {max_drop: 0.1}
"""


def test_the_spec_itself_is_good() -> None:
    assert parse_spec(SPEC, "f").name == "nightly"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "epochs: 1",
            f"epochs: {2**31}",
            "10: recipes.r.train.epochs: should be less than 2147483648, not 2147483648",
        ),
        (
            "max_drop: 0.1",
            f"max_drop: {HUGE}",
            "11: recipes.r.validate.max_drop: should be a number from 0 (absolute) or a percentage such as 1% "
            f"(relative), not {str(HUGE)[:100]}...",
        ),
        (
            "max_drop: 0.1",
            "max_drop: 9e99%",
            "11: recipes.r.validate.max_drop: should be a number from 0 (absolute) or a percentage such as 1% "
            "(relative), not '9e99%'",
        ),
        (
            "shape: [1]",
            f"shape: [{HUGE}]",
            "5: models[0].inputs.x.shape[0]: should be a whole number from 1, or the word batch, "
            f"not {str(HUGE)[:100]}...",
        ),
    ],
    ids=["count", "drop", "percentage", "dimension"],
)
def test_numbers_that_no_machine_counts_to(old: str, new: str, line: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(SPEC.replace(old, new), "f")
    assert str(caught.value) == f"f:{line}"


def test_of_thousands_of_mistakes_the_first_are_told_and_the_others_counted() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(SPEC + "".join(f"k{number}: 1\n" for number in range(3000)), "f")
    lines = str(caught.value).split("\n")
    assert len(lines) == 1001
    assert lines[0].startswith("f:12: k0: unknown key")
    assert lines[-1] == "f: and 2000 more problems"


def test_what_never_ends_is_no_spec(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetpress.jobs.spec.fleet_spec._MOST_BYTES", 1000)
    for place in (s3_uri, str(tmp_path)):
        open_store(place).put("long.yaml", b"#" * 1001)
        with pytest.raises(SpecError, match=r"long\.yaml: more than 1000 bytes; name models by patterns"):
            load_spec(f"{place}/long.yaml")
