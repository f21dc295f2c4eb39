"""Data-parallel training through Ray Train: sums are right on every rank, and failures are classified."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray
import torch

from fleetpress.compression.errors import TrainingDivergedError
from fleetpress.jobs.executors import Executor, open_executor
from fleetpress.jobs.tasks import Failure, StepResult, Task, TaskRecord

if TYPE_CHECKING:
    from fleetpress.compression.collectives import Collective

pytestmark = pytest.mark.long

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file


def step(task: Task) -> StepResult:
    return StepResult(result={"where": "one worker", "workers": task.workers})


def rank(task: Task, collective: "Collective") -> StepResult | None:
    """Sums of what each rank holds; `die_on` names a rank that does not live to see them.

    Rank `raise_on` raises what it found: the sums are the same on every rank, and one group of workers, which takes
    long to start, shows both.
    """
    if task.payload.get("die_on") == collective.rank:
        time.sleep(1)
        os._exit(1)
    mine = float(collective.rank + 1)
    whole, column, double = torch.full((2, 3), mine), torch.ones(3, 2).t()[1], torch.tensor(mine).double()
    collective.sum_([whole, column, double])
    weight = torch.tensor(2.0, requires_grad=True)
    summed = collective.differentiable_sum(weight * mine)
    (summed**2 * mine).backward()
    gradient = weight.grad
    assert gradient is not None
    gradients = [torch.zeros(()) for _ in range(collective.size)]
    gradients[collective.rank] = gradient.clone()
    collective.sum_(gradients)
    found = {
        "size": collective.size,
        "whole": whole.tolist(),
        "column": column.tolist(),
        "double": double.item(),
        "summed": summed.item(),
        "gradients": [one.item() for one in gradients],
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
    }
    if task.payload.get("raise_on") == collective.rank:
        raise TrainingDivergedError(json.dumps(found))
    return StepResult(result=found) if collective.rank == 0 else None


@pytest.fixture
def executor(ray_cluster: None, tmp_path: Path) -> Iterator[Executor]:
    opened = open_executor("ray", step, str(tmp_path), run_rank=rank)
    yield opened
    opened.close()


def run(executor: Executor, workers: int, kind: str = "train", **payload: object) -> TaskRecord | Failure:
    executor.submit(Task(id="t", model="m", kind=kind, digest="t", workers=workers, payload=payload))
    [(_, end)] = executor.wait(120)
    return end


def test_two_workers_sum_exactly_and_the_rank_that_raises_ends_the_group_with_its_own_error(
    executor: Executor,
) -> None:
    """What rank 0 returns comes back from a whole training: end_to_end/test_training_workers.py."""
    end = run(executor, 2, raise_on=1)
    assert isinstance(end, Failure), end
    assert end.error_class == "input"
    # loss of rank r = (1 + r) * (w * 1 + w * 2)^2 with w = 2, so d(sum of losses)/d(summed) = 2 * 6 * 3 = 36.
    assert json.loads(end.reason) == {
        "size": 2,
        "whole": [[3.0, 3.0, 3.0]] * 2,
        "column": [2.0, 2.0, 2.0],
        "double": 3.0,
        "summed": 6.0,
        "gradients": [36.0, 72.0],
        "folder": os.getcwd(),
        "threads": 1,
    }


def test_a_rank_that_dies_is_transient_and_holds_no_cpu(executor: Executor) -> None:
    end = run(executor, 2, die_on=1)
    assert isinstance(end, Failure)
    assert (end.error_class, end.reason) == ("transient", "a training worker died")
    assert isinstance(run(executor, 1, kind="quantize"), TaskRecord)


def test_more_workers_than_cpus_fail_at_once(executor: Executor) -> None:
    end = run(executor, 3)
    assert isinstance(end, Failure)
    assert "train asks for 3 CPU" in end.reason


def test_other_kinds_have_one_worker(executor: Executor) -> None:
    end = run(executor, 2, kind="quantize")
    assert isinstance(end, TaskRecord)
    assert end.result == {"where": "one worker", "workers": 2}
