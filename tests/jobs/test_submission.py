"""Which job a submit starts or joins, and which clusters it refuses; the job server is played here."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs import submitted
from fleetpress.jobs.cli import main
from fleetpress.jobs.errors import ClusterUnreachable, UsageError
from fleetpress.jobs.executors.job_state import JobState
from fleetpress.jobs.submission import Submitted, submit_spec

SPEC = """\
version: 1
name: {name}
output: s3://bucket/out
models: [{{source: "s3://bucket/in/net.pt2", recipe: w4}}]
recipes: {{w4: {{quantize: {{scheme: W4A16}}}}}}
"""
ADDRESS = "http://head:8265"


class PlayedServer:
    """Jobs by id; a job that is started runs. `taken` is a job that someone else starts at the same moment."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobState] = {}
        self.entrypoints: dict[str, str] = {}
        self.environments: list[Mapping[str, Any]] = []
        self.told = {"ray": "2.60.0", "python": "3.12.1"}
        self.taken: JobState | None = None
        self.address = ADDRESS

    def __call__(self, address: str) -> "PlayedServer":
        self.address = address
        return self

    def versions(self) -> Mapping[str, str]:
        return self.told

    def state(self, job: str) -> JobState | None:
        return self.jobs.get(job)

    def states(self) -> list[JobState]:
        return list(self.jobs.values())

    def submit(
        self, job: str, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> bool:
        self.environments.append(runtime_env)
        self.entrypoints[job] = entrypoint
        if self.taken is not None:
            self.jobs[job] = self.taken
            return False
        self.jobs[job] = JobState(job=job, state="pending", metadata=metadata)
        return True

    def end(self, job: str, code: int) -> None:
        state = "failed" if code else "succeeded"
        self.jobs[job] = JobState(job=job, state=state, driver_exit_code=code)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> PlayedServer:
    played = PlayedServer()
    monkeypatch.setattr("fleetpress.jobs.executors.ray_jobs.JobServer", played)
    return played


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(SPEC.format(name="nightly"))
    return path


def submit(spec: Path, address: str = ADDRESS, **options: Any) -> Submitted:
    return submit_spec(spec, address=address, **options)


def test_the_same_again_joins_what_runs_and_follows_what_has_ended(server: PlayedServer, spec: Path) -> None:
    first = submit(spec)
    assert (first.is_new, first.state, first.exit_code, first.name) == (True, "pending", None, "nightly")
    assert submit(spec).job == first.job
    assert not submit(spec).is_new
    for number, code in enumerate(
        (3, 0, 130, 0, 0, 0, 0, 0, 0, 0), start=2
    ):  # beyond 10, where text sorts otherwise
        server.end(submit(spec).job, code)
        following = submit(spec)
        assert (following.job, following.is_new) == (f"{first.job}-{number}", True)
    spec.write_text(SPEC.format(name="weekly"))
    assert submit(spec).job.startswith("fleetpress-weekly-")


def test_who_is_a_moment_later_joins(server: PlayedServer, spec: Path) -> None:
    server.taken = JobState(job="taken", state="running")
    assert (submit(spec).is_new, submit(spec).state) == (False, "running")


def test_a_given_id_is_one_job_for_ever(server: PlayedServer, spec: Path) -> None:
    assert submit(spec, submission_id="mine").is_new
    assert not submit(spec, submission_id="mine").is_new
    server.end("mine", 4)
    ended = submit(spec, submission_id="mine")
    assert (ended.is_new, ended.state, ended.exit_code) == (False, "failed", 4)
    assert list(server.entrypoints) == ["mine"]
    assert not ended.warnings
    server.jobs["mine"] = replace(server.jobs["mine"], metadata={"digest": "another"})
    (warning,) = submit(spec, submission_id="mine").warnings
    assert warning == "job mine was started with another spec, other code or another fleetpress"
    for bad in ("", "a b", "../x", "-x", "a/b", "x" * 129, "$(id)", "a\n"):
        with pytest.raises(UsageError, match="cannot be a job's id"):
            submit(spec, submission_id=bad)


def test_the_shell_sees_words_and_no_variables_travel(
    server: PlayedServer, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    address = "http://head:8265/$(touch${IFS}x)';id"
    job = submit(spec, address, allow_code=True).job
    words = shlex.split(server.entrypoints[job])
    assert words[:2] == ["exec", "$(command -v python || command -v python3)"]
    assert words[2:] == ["-m", "fleetpress.jobs.submitted", job, "--address", address, "--allow-code"]
    assert set(server.environments[0]) == {"working_dir", "py_modules"}


def test_the_command_line_takes_ray_s_own_variables_for_the_address(
    server: PlayedServer, spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # of the cluster itself, not of its job server
    assert main(["submit", str(spec), "--no-wait"]) == 2
    assert "no cluster is named; give --address http://head:8265" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert main(["submit", str(spec), "--no-wait"]) == 0
    assert server.address == "http://other:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert main(["submit", str(spec), "--no-wait", "--json"]) == 0
    assert server.address == "http://third:8265"
    first, _, told = capsys.readouterr().out.partition("\n")
    assert json.loads(told)["job"] == first
    server.end(first, 3)
    assert main(["submit", str(spec), "--submission-id", first]) == 3
    capsys.readouterr()
    for verb in ("status", "logs", "cancel", "report"):
        assert main([verb, first]) == 2
        assert f"{first} is the id of a job; add the --address of its cluster" in capsys.readouterr().err


@pytest.mark.parametrize(
    "told",
    [
        {"ray": "2.59.1", "python": "3.11.4"},
        {"ray": "3.0.0", "python": "3.11.4"},
        {"ray": "2.60.0", "python": "3.10.9"},
        {"ray": "1.13.0"},
    ],
    ids=lambda told: " ".join(told.values()),
)
def test_a_cluster_that_does_not_fit_is_named_with_what_would(
    server: PlayedServer, spec: Path, told: dict[str, str]
) -> None:
    server.told = told
    with pytest.raises(ClusterUnreachable) as caught:
        submit(spec)
    said = f"the cluster at {ADDRESS} has Ray {told['ray']} and Python {told.get('python', '?')}, this machine Ray "
    assert said in str(caught.value)
    assert "runs on Ray " in str(caught.value)
    assert not server.jobs


def test_newer_clusters_and_those_that_do_not_tell_their_python_fit(server: PlayedServer, spec: Path) -> None:
    server.told = {"ray": "2.99.0rc1"}
    assert submit(spec).is_new


def test_a_node_that_lacks_a_dependency_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submitted, "_NEEDED", ("sys", "no_such_module"))
    assert submitted.main(["job", "--address", ADDRESS]) == 5
    assert "has no no_such_module; install fleetpress' dependencies on every node" in capsys.readouterr().err
