"""The engine of benchmarks/crashes, and the undisturbed run of each kind of model, done once for all tests here."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks" / "crashes"))

from crash_fleets import KINDS, write_code, write_sources
from crash_forks import shared_runs
from crash_trials import Course, Quiet
from crashes import s3_server

Courses = Callable[[str, str], tuple[Course, Quiet]]


Started = tuple[Courses, dict[str, str]]


@pytest.fixture
def courses(started: Started, monkeypatch: pytest.MonkeyPatch) -> Courses:
    """By kind and store ("folder" or "s3"): the course, and what its undisturbed run published."""
    found, environment = started
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture(scope="package")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """The courses, and the AWS_* variables that lead to the server of some; they are set for one test at a time."""
    folder = tmp_path_factory.mktemp("crashes")
    write_code(folder)
    found: dict[tuple[str, str], tuple[Course, Quiet]] = {}
    before = dict(os.environ)
    with s3_server() as bucket:
        environment = {name: value for name, value in os.environ.items() if value != before.get(name)}
        places = {"folder": str(folder), "s3": bucket}
        for place in places.values():
            write_sources(f"{place}/source")

        def course_of(kind: str, store: str) -> tuple[Course, Quiet]:
            if (kind, store) not in found:
                course = Course(
                    shared_runs(),
                    KINDS[kind],
                    source=f"{places[store]}/source",
                    outputs=f"{places[store]}/outputs",
                    folder=folder,
                    environment=environment,
                )
                found[kind, store] = course, course.quiet()
            return found[kind, store]

        for name in environment:
            del os.environ[name]
        os.environ.update(before)
        yield course_of, environment
