"""What has changed since the run before, and what stands on top."""

from dataclasses import replace

import pytest

from fleetpress.jobs.report.comparison import MEANINGS, compare
from fleetpress.jobs.report.problems import problems, split_reason
from fleetpress.jobs.runs.results import (
    FleetResult,
    ModelResult,
    ModelState,
)


def run(**states: tuple[ModelState, str | None] | ModelState) -> FleetResult:
    """A run whose models have these states, and digests where they are given."""
    models = []
    for name, told in states.items():
        state, digest = told if isinstance(told, tuple) else (told, None)
        models.append(
            ModelResult(name=name, state=state, digest=digest, reason="x" if state == "failed" else None)
        )
    return FleetResult(run="r", state="done", name="n", output="o", models=tuple(models))


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (("published", "a"), ("unchanged", "a"), "unchanged"),
        (("published", "a"), ("published", "a"), "unchanged"),
        (("unchanged", "a"), ("published", "b"), "changed"),
        (("published", "a"), "rejected", "regressed"),
        (("unchanged", "a"), "failed", "regressed"),
        ("failed", "rejected", "still failing"),
        ("rejected", ("published", "a"), "recovered"),
        ("pending", ("published", "a"), "recovered"),
        ("pending", "failed", "still failing"),
        (("published", "a"), "pending", "unfinished"),
        (("published", "a"), "running", "unfinished"),
    ],
)
def test_changes(before: ModelState, now: ModelState, change: str) -> None:
    assert compare(run(m=now), run(m=before)).changes == {"m": change}
    assert change in MEANINGS


def test_new_and_removed_models() -> None:
    found = compare(run(kept="published", new="failed"), run(gone="published", kept="published"))
    assert found.changes == {"kept": "unchanged", "new": "new"}
    assert found.removed == ("gone",)
    assert found.names("new") == ["new"]


def test_without_a_run_before_nothing_is_said() -> None:
    found = compare(run(m="published"), None)
    assert not found.changes
    assert found.before is None


def test_a_run_that_knows_no_models_yet_has_removed_none() -> None:
    assert compare(run(), run(m="published")).removed == ()


def test_regressions_first_then_new_problems_then_old_ones() -> None:
    now = run(old="failed", fresh="failed", good="published", worse="failed", also="rejected")
    before = run(old="rejected", good="published", worse="published", also="unchanged")
    found = problems(now, compare(now, before))
    assert [problem.name for problem in found] == ["worse", "also", "fresh", "old"]
    assert [problem.published_before for problem in found] == [True, True, False, False]


def test_an_unfinished_model_with_a_reason_is_a_problem_too() -> None:
    now = run(m="pending")
    now = replace(now, models=(replace(now.models[0], reason="why"),))
    assert [problem.reason for problem in problems(now, compare(now, None))] == ["why"]


@pytest.mark.parametrize(
    ("reason", "what", "remedy"),
    [
        ("a is broken; save it again", "a is broken", "save it again"),
        ("a; b; do this", "a; b", "do this"),
        ("lost; look at the node (tried 3 times)", "lost (tried 3 times)", "look at the node"),
    ],
)
def test_a_reason_tells_the_remedy(reason: str, what: str, remedy: str) -> None:
    assert split_reason(reason, "failed") == (what, remedy)


def test_a_reason_without_a_remedy_is_given_one() -> None:
    assert "run the spec again" in split_reason("it broke", "failed")[1]
    assert "max_drop" in split_reason("; ", "rejected")[1]
