"""The inline executor: one task at a time, in order, in this process."""

import os
from pathlib import Path

from fleetpress.jobs.executors import open_executor
from fleetpress.jobs.ledger import Ledger
from fleetpress.jobs.tasks import Failure, StepResult, Task, TaskRecord
from fleetpress.storage.errors import StoreUnreachable
from fleetpress.storage.store import open_store


def step(task: Task) -> StepResult:
    if task.payload.get("unreachable"):
        raise StoreUnreachable("no answer")
    return StepResult(result={"process": os.getpid()})


def task(name: str, **payload: object) -> Task:
    return Task(id=name, model="m", kind="quantize", digest=name, payload=payload)


def test_tasks_end_in_the_order_they_came_and_are_recorded(tmp_path: Path) -> None:
    executor = open_executor("inline", step, str(tmp_path))
    assert executor.slots == 1
    assert executor.wait(0) == []
    executor.submit(task("b"))
    executor.submit(task("a"))
    ends = [*executor.wait(10), *executor.wait(10), *executor.wait(10)]
    assert [name for name, _ in ends] == ["b", "a"]
    assert Ledger(open_store(str(tmp_path))).known() == {"a", "b"}
    assert {end.result["process"] for _, end in ends if isinstance(end, TaskRecord)} == {os.getpid()}


def test_a_second_submission_is_a_second_attempt(tmp_path: Path) -> None:
    executor = open_executor("inline", step, str(tmp_path))
    executor.submit(task("a", unreachable=True))
    [(_, failure)] = executor.wait(10)
    assert isinstance(failure, Failure)
    assert failure.error_class == "transient"
    executor.submit(task("a"))
    [(_, record)] = executor.wait(10)
    assert isinstance(record, TaskRecord)
    assert record.attempts == 2


def test_closing_drops_what_has_not_run(tmp_path: Path) -> None:
    executor = open_executor("inline", step, str(tmp_path))
    executor.submit(task("a"))
    executor.close()
    assert executor.wait(10) == []
    assert Ledger(open_store(str(tmp_path))).known() == set()
