"""The inline executor: tasks in this process, in order, one at a time but for those that stream."""

import os
import threading
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


def test_streaming_tasks_run_side_by_side_as_far_as_memory_allows(tmp_path: Path) -> None:
    meeting = threading.Barrier(2)

    def meet(task: Task) -> StepResult:
        met = True
        try:
            meeting.wait(timeout=5 if task.payload["together"] else 0.2)
        except threading.BrokenBarrierError:
            met = False
            meeting.reset()
        return StepResult(result={"met": met})

    executor = open_executor("inline", meet, str(tmp_path), memory_bytes=100)
    for memory, together in ((50, True), (51, False)):
        for name in "ab":
            executor.submit(
                Task(
                    id=name,
                    model="m",
                    kind="convert",
                    digest=f"{name}{memory}",
                    payload={"together": together},
                    memory_bytes=memory,
                )
            )
        assert executor.slots == 2
        ends = [*executor.wait(10)]
        while len(ends) < 2:
            ends += executor.wait(10)
        assert executor.slots == 1
        assert {end.result["met"] for _, end in ends if isinstance(end, TaskRecord)} == {together}
    executor.close()
