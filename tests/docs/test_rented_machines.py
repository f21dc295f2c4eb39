"""The pages about clusters: the store is real, rented machines are not; their commands go to strict stand-ins."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import UsageError
from ray.scripts.scripts import cli as ray_cli

from fleetpress.jobs import run_fleet
from fleetpress.jobs.driver.job_records import JobRecord
from fleetpress.jobs.executors import ray_jobs
from fleetpress.jobs.executors.job_state import JobState
from fleetpress.jobs.shipment import SPEC_IN_JOB
from fleetpress.jobs.spec.fleet_spec import load_spec
from fleetpress.storage.store import open_store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reader_of_the_repository(reader: Any, tmp_path: Path, s3_uri: str) -> Any:
    """A reader in a folder with the repository's files that the pages need, and with two models in the bucket."""
    import torch
    from safetensors.torch import save

    for name in ("cluster.yaml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    store = open_store(f"{s3_uri}/fleet")
    for name in ("one", "two"):
        store.put(f"models/{name}/model.safetensors", save({"up.weight": torch.ones(8, 8)}))
    return reader(**{"s3://my-bucket": s3_uri})


class OneProcessCluster:
    """A job server that runs the shipped spec in this process when it takes the job."""

    jobs: dict[str, JobState] = {}

    def __init__(self, address: str) -> None:
        assert address == "http://127.0.0.1:8265"
        self.address = address

    def versions(self) -> dict[str, str]:
        """As those of this machine."""
        return {}

    def states(self) -> list[JobState]:
        """Every job."""
        return list(self.jobs.values())

    def state(self, job: str) -> JobState | None:
        """One job."""
        return self.jobs.get(job)

    def submit(
        self, job: str, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> bool:
        """What the driver on the head would do."""
        assert job in entrypoint
        assert all(Path(place).is_dir() for place in runtime_env["py_modules"])
        spec = load_spec(f"{runtime_env['working_dir']}/{SPEC_IN_JOB}")
        result = run_fleet(spec, executor="inline", job=JobRecord(job=job, address=self.address))
        state = "succeeded" if result.exit_code == 0 else "failed"
        self.jobs[job] = JobState(
            job=job, state=state, driver_exit_code=result.exit_code, metadata=dict(metadata)
        )
        return True

    def follow(self, job: str, write: Callable[[str], object]) -> JobState:
        """It has ended."""
        write("the fleet's table\n")
        return self.jobs[job]


def test_on_aws(reader_of_the_repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "JobServer", OneProcessCluster)
    monkeypatch.setattr(OneProcessCluster, "jobs", {})
    someone = reader_of_the_repository
    someone.follow("aws.md")
    typed = someone.records("ray")
    assert {words[0] for words in typed} == {"get-auth-token", "up", "dashboard", "exec", "down"}
    for name, *words in typed:
        command = ray_cli.get_command(None, name)
        try:
            command.make_context(name, list(words))
        except UsageError as error:
            pytest.fail(f"ray {name} {words}: {error}")
    assert [state.state for state in OneProcessCluster.jobs.values()] == ["succeeded"]


def test_on_kubernetes(reader_of_the_repository: Any, s3_uri: str) -> None:
    someone = reader_of_the_repository
    someone.follow("kubernetes.md")
    documents = list(yaml.safe_load_all((someone.place / "manifests/kuberay.yaml").read_text()))
    assert {"ConfigMap", "CronJob"} <= {document["kind"] for document in documents}
    text = json.dumps(documents)
    assert "registry.example.com/fleetpress:nightly" in text
    assert "fleetpress-environment" in text
    verbs = [words[0] for words, _ in itertools.groupby(someone.records("kubectl"))]
    assert verbs == ["create", "apply", "get", "describe"]
