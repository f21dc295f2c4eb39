"""The fault matrix of benchmarks/faults, its quicker part: each kind of fault once, in the place where it hurts most.

`python benchmarks/faults/faults.py` runs all of it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleetpress.jobs.seaweed import SeaweedFS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "faults"))

from fault_cases import Case, cases
from fault_fleet import MODELS
from faults import Matrix, Row, matrix, summary, table
from forked_runs import shared_runner

pytestmark = pytest.mark.long

CHOSEN = (
    "200 with an error in it",
    "resets, every 7th request",
    "stalled body",
    "body cut (length): weights",
    "body cut (range): shard read back",
    "flipped bit: weights",
    "flipped bit: data",
    "flipped bit: name alone in the header",
    "flipped bit: shard read back",
    "cut upload of a part",
    "lost reply: conditional write",
    "lost reply: CreateMultipartUpload",
    "lost reply: CompleteMultipartUpload",
    "credentials expire in the parts",
)


@pytest.fixture(scope="module")
def faulty(
    seaweedfs: SeaweedFS, seaweed_bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Matrix]:
    """The small fleet on SeaweedFS, published once without any fault."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, value in seaweedfs.environment.items():
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("faults")
        found = stack.enter_context(matrix(seaweedfs, seaweed_bucket, shared_runner(), folder))
        patch.undo()  # each test sets them for itself
        yield found


@pytest.fixture(autouse=True)
def at_the_server(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are read past the relay."""
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    assert os.environ["AWS_ENDPOINT_URL"] == seaweedfs.endpoint


def _chosen() -> list[Case]:
    by_name = {case.name: case for case in cases()}
    return [by_name[name] for name in CHOSEN]


@pytest.mark.parametrize("case", _chosen(), ids=lambda case: case.name)
def test_a_fault_costs_nothing(case: Case, faulty: Matrix) -> None:
    row = faulty.row(case)
    assert row.ok, f"{row.problem} {row.wrong}"
    assert row.hits
    assert (row.lost, row.doubled, row.wrong) == (0, 0, ())
    if row.survived != "same run":
        assert case.resumes
        assert row.reason
    assert row.uploads == (case.name == "lost reply: CreateMultipartUpload")


def test_the_quiet_run_published_all(faulty: Matrix) -> None:
    assert sorted(faulty.quiet.artifacts) == sorted(MODELS)
    assert not faulty.quiet.problems


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) > 60


@pytest.mark.parametrize("spoiled", [{"hits": 0}, {"lost": 1}, {"doubled": 1}, {"wrong": ("x",)}])
def test_sums_say_what_went_wrong(spoiled: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "fault": "f", "hits": 1, "survived": "same run", "lost": 0, "doubled": 0, "wrong": (), "uploads": 0,
        "seconds": 1.0, "reason": "", "problem": "p",
    }  # fmt: skip
    row = Row(**(fields | spoiled))  # type: ignore[arg-type]
    assert not row.ok
    line = summary([row])
    assert line in table([row])
    for name in ("lost", "doubled", "wrong"):
        assert f"{int(name in spoiled)} {name}" in line
