"""Tasks that ask for a GPU: where there is none, it is said before anything is begun."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fleetpress.jobs import run_fleet
from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.executors import open_executor
from fleetpress.jobs.executors.ray_cluster import Room, gpu_problem, problem_of
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.tasks import StepResult, Task, task_from_json, to_json

SPEC = """\
version: 1
name: fleet
output: {place}/output
models:
  - {{source: "{place}/net.pt2", data: digits, recipe: small}}
data:
  digits: {{train: "{place}/train.npz", loss: cross_entropy}}
recipes:
  small: {{train: {{epochs: 1}}}}
resources: {{gpus_per_task: {gpus}}}
"""
TASK = Task(id="m/train", model="m", kind="train", digest="d", gpus=0.5)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tests run on a machine that has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("workers", "gpus", "fits"),
    [(1, 1.0, True), (2, 1.0, True), (3, 1.0, False), (4, 0.5, True), (6, 0.3, True), (7, 0.3, False)],
)
def test_room_counts_gpus_of_each_node(workers: int, gpus: float, fits: bool) -> None:
    rooms = [
        Room(cpus=8, memory_bytes=1, gpus=1.0),
        Room(cpus=8, memory_bytes=1),
        Room(cpus=8, memory_bytes=1, gpus=1.0),
    ]
    problem = problem_of(replace(TASK, gpus=gpus), workers, rooms)
    assert bool(problem) != fits
    assert f"{workers} CPU and {gpus:g} GPU each" in problem or fits


def test_thirds_of_a_gpu_make_one() -> None:
    assert Room(cpus=8, memory_bytes=1, gpus=1.0).fits(0, 1 / 3) == 3
    assert Room(cpus=2, memory_bytes=1, gpus=1.0).fits(0, 1 / 3) == 2


def test_a_cluster_without_gpus_is_told() -> None:
    problem = gpu_problem(1.0, [Room(cpus=8, memory_bytes=1)])
    assert "asks for 1 GPU a task, and none of the cluster's 1 nodes has any" in problem
    assert gpu_problem(1.0, []) == gpu_problem(0.0, [Room(cpus=8, memory_bytes=1)]) == ""


def step(task: Task) -> StepResult:
    raise AssertionError("no task may begin")


def test_no_gpu_in_the_cluster(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of the cluster's 1 nodes has any: add a node"):
        open_executor("ray", step, str(tmp_path), gpus=0.5)


def test_no_gpu_here(no_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch finds none here"):
        open_executor("inline", step, str(tmp_path), gpus=1.0)
    open_executor("inline", step, str(tmp_path)).close()


def test_tasks_carry_what_they_ask_for() -> None:
    assert task_from_json(to_json(TASK)) == TASK


@pytest.mark.parametrize("gpus", ["-1", "2", "1.5", "many"])
def test_a_task_computes_on_one_gpu_at_most(gpus: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"spec.yaml:10: resources.gpus_per_task"):
        parse_spec(SPEC.format(place=tmp_path, gpus=gpus), "spec.yaml")
    assert parse_spec(SPEC.format(place=tmp_path, gpus="0.25"), "spec.yaml").resources.gpus_per_task == 0.25


def test_a_run_ends_before_anything_is_begun(no_gpu: None, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"nobody opens it")
    (tmp_path / "train.npz").write_bytes(b"nobody opens it")
    spec = parse_spec(SPEC.format(place=tmp_path, gpus="1"), "spec.yaml")
    with pytest.raises(UsageError, match="gpus_per_task"):
        run_fleet(spec, executor="inline")
    assert not list((tmp_path / "output").glob("records/*"))
