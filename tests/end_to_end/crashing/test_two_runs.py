"""Two runs of one spec at once: both end well, and together they publish what one alone does, byte for byte."""

from collections.abc import Callable

import pytest
from crash_trials import Course, Quiet
from crashes import race, table

pytestmark = pytest.mark.long

Courses = Callable[[str, str], tuple[Course, Quiet]]


@pytest.mark.parametrize(
    ("kind", "store", "pairs"),
    [("checkpoint", "folder", 2), ("shards", "folder", 2), ("shards", "s3", 1), ("program", "folder", 1)],
)
@pytest.mark.parametrize("mode", ["two runs", "two runs, blind"])
def test_two_runs_at_once_publish_what_one_does(
    kind: str, store: str, pairs: int, mode: str, courses: Courses
) -> None:
    """`blind`: no write heeds its condition, as on servers without conditional writes; both may then do all tasks."""
    course, quiet = courses(kind, store)
    row = race(course, quiet, course.outputs, store, mode, seeds=range(pairs))
    assert not row.bad, table([row]) + "\n" + "\n".join(map(str, row.bad))
    assert [trial.codes for trial in row.trials] == [(0, 0)] * pairs
