"""The Ray executor on a real cluster: the same records as inline, bounded failures, credentials that stay here."""

import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from fleetpress.jobs.driver.scheduler import Scheduler
from fleetpress.jobs.errors import ClusterUnreachable, ModelError
from fleetpress.jobs.executors import Executor, open_executor
from fleetpress.jobs.executors.ray import RayExecutor
from fleetpress.jobs.ledger import Ledger
from fleetpress.jobs.tasks import Failure, StepResult, Task, TaskRecord
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import is_s3

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file

GIB = 2**30


def step(task: Task) -> StepResult:
    match task.payload.get("do"):
        case "die once" if not os.path.exists(task.payload["mark"]):
            Path(task.payload["mark"]).touch()
            os._exit(1)
        case "raise":
            raise ModelError("m: no layer called fc")
        case "sleep":
            Path(task.payload.get("mark", os.devnull)).touch()
            time.sleep(60)
        case "variables":
            return StepResult(result={"endpoint": os.environ.get("AWS_ENDPOINT_URL", "")})
    return StepResult(result={"double": 2 * int(task.payload.get("number", 0))})


def task(name: str, **payload: object) -> Task:
    return Task(id=name, model="m", kind="quantize", digest=name, payload=payload)


def drain(executor: Executor, tasks: list[Task]) -> dict[str, TaskRecord | Failure]:
    for one in tasks:
        executor.submit(one)
    ends: dict[str, TaskRecord | Failure] = {}
    while len(ends) < len(tasks):
        some = executor.wait(60)
        assert some, f"nothing ended in time; ended before: {sorted(ends)}"
        ends.update(some)
    return ends


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and deadlines are looked after more often, so that nobody waits for what is there."""
    monkeypatch.setattr("fleetpress.jobs.executors.ray._LOOK_SECONDS", 0.2)
    monkeypatch.setattr("fleetpress.jobs.executors.ray_cluster._LOOK_SECONDS", 0.1)


@pytest.fixture
def executor(ray_cluster: None, tmp_path: Path) -> Iterator[Executor]:
    opened = open_executor("ray", step, str(tmp_path / "ray"))
    yield opened
    opened.close()


def test_the_same_records_as_inline(executor: Executor, tmp_path: Path) -> None:
    tasks = [task(f"t{number}", number=number) for number in range(20)] + [task("bad", do="raise")]
    inline = open_executor("inline", step, str(tmp_path / "inline"))
    ours, theirs = drain(inline, tasks), drain(executor, tasks)
    assert {name: untimed(end) for name, end in theirs.items()} == {
        name: untimed(end) for name, end in ours.items()
    }
    ledger = Ledger(open_store(str(tmp_path / "ray")))
    assert ledger.known() == {one.id for one in tasks} - {"bad"}
    assert ledger.find("t3") == theirs["t3"]
    assert {end.where for end in ours.values()} == {"inline"}
    nodes = {end.where for end in theirs.values()}
    assert len(nodes) == 1
    assert re.fullmatch(r"[\d.]+/[0-9a-f]{6}", nodes.pop())


def untimed(end: TaskRecord | Failure) -> TaskRecord | Failure:
    return replace(end, seconds=0.0, where="")


def test_slots_are_the_cpus_of_the_cluster(executor: Executor) -> None:
    assert executor.slots == 2


def test_a_worker_that_dies_is_transient_and_the_scheduler_tries_again(
    executor: Executor, tmp_path: Path
) -> None:
    mortal = task("mortal", do="die once", mark=str(tmp_path / "mark"), number=4)
    scheduler = Scheduler([mortal, task("other")])
    seen: list[str] = []
    while not scheduler.is_over:
        for ready in scheduler.ready(executor.slots - scheduler.running_count, math.inf):
            executor.submit(ready)
        for name, end in executor.wait(60):
            if isinstance(end, Failure):
                assert end.reason == "quantize did not end: its worker process died"
                seen.append(scheduler.failed(name, end))
            else:
                scheduler.finished(name)
    assert seen == ["retry"]
    record = Ledger(open_store(str(tmp_path / "ray"))).find("mortal")
    assert record is not None
    assert (record.attempts, record.result) == (2, {"double": 8})


def test_a_node_that_sees_another_output_does_nothing(ray_cluster: None, store_uri: str) -> None:
    """Its results would lie where nobody looks."""
    mark, remedy = "runs/1/summary.json", "AWS_ENDPOINT_URL" if is_s3(store_uri) else "shared folder"
    executor = open_executor("ray", step, store_uri, mark=mark)
    [end] = drain(executor, [task("t", number=3)]).values()
    assert isinstance(end, Failure)
    assert end.error_class == "input"
    assert re.match(rf"node \S+/\w+ does not see the {store_uri} of the machine.*{remedy}", end.reason)
    store = open_store(store_uri)
    assert not store.list()
    store.put(mark, b"{}")
    assert isinstance(drain(executor, [task("t", number=3)])["t"], TaskRecord)
    executor.close()


def test_what_no_node_can_hold_fails_at_once_and_says_what_there_is(executor: Executor) -> None:
    started = time.monotonic()
    huge = replace(task("huge"), memory_bytes=2**50)
    end = drain(executor, [huge])["huge"]
    assert time.monotonic() - started < 5
    assert isinstance(end, Failure)
    assert end.error_class == "input"
    assert "1 CPU with 1048576.0 GiB of memory" in end.reason
    assert "largest with 2 CPU" in end.reason


def test_memory_is_reserved(executor: Executor) -> None:
    assert isinstance(drain(executor, [replace(task("small"), memory_bytes=GIB // 8)])["small"], TaskRecord)


def test_waiting_ends_in_time_and_closing_ends_the_task(ray_cluster: None, tmp_path: Path) -> None:
    executor = open_executor("ray", step, str(tmp_path))
    executor.submit(task("slow", do="sleep"))
    started = time.monotonic()
    assert executor.wait(0.2) == []
    executor.close()
    assert time.monotonic() - started < 5
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2.0:  # the killed task gives its CPU back
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_workers_on_this_machine_see_the_variables_of_now(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for endpoint in ("http://127.0.0.1:1", "http://127.0.0.1:2"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        executor = open_executor("ray", step, str(tmp_path))
        end = drain(executor, [task("v", do="variables")])["v"]
        assert isinstance(end, TaskRecord)
        assert end.result["endpoint"] == endpoint


def test_variables_never_leave_the_machine(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://secret")
    node = {**ray.nodes()[0], "NodeManagerAddress": "10.0.0.7"}
    with monkeypatch.context() as patch:
        patch.setattr(ray, "nodes", lambda: [node])
        executor = RayExecutor(step, str(tmp_path))
    end = drain(executor, [task("v", do="variables")])["v"]
    assert isinstance(end, TaskRecord)
    assert end.result["endpoint"] != "http://secret"


def test_a_task_over_its_time_is_ended_and_may_be_tried_again(ray_cluster: None, tmp_path: Path) -> None:
    executor = RayExecutor(step, str(tmp_path / "ray"), task_seconds=1.5)
    end = drain(executor, [task("slow", do="sleep"), task("quick", number=2)])["slow"]
    assert isinstance(end, Failure)
    assert end.error_class == "transient"
    assert end.reason == "quantize did not run within 1.5 seconds (resources.time_per_task)"
    assert isinstance(drain(executor, [task("next", number=3), task("other", number=4)])["next"], TaskRecord)
    executor.close()


def test_a_task_whose_node_is_not_among_the_living_is_lost(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens when a node is cut off: Ray marks it dead, and goes on waiting for its tasks."""
    executor = RayExecutor(step, str(tmp_path / "ray"))
    mark = tmp_path / "began"
    executor.submit(task("cut off", do="sleep", mark=str(mark)))
    while not mark.exists():
        assert executor.wait(0.2) == []
    assert executor.wait(0.5) == []
    monkeypatch.setattr("fleetpress.jobs.executors.ray_cluster._living_nodes", list)
    [(name, end)] = executor.wait(20)
    assert isinstance(end, Failure)
    assert (name, end.error_class) == ("cut off", "lost")
    assert end.reason == "quantize did not end: its node was lost"
    executor.close()


def load_when_allowed(mark: str) -> Callable[[Task], StepResult]:
    while not os.path.exists(mark):
        time.sleep(0.05)
    return step


class SlowToLoad:
    """A step whose modules take a worker long to import."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return load_when_allowed, (str(self._mark),)

    def __call__(self, _task: Task) -> StepResult:
        raise NotImplementedError


def test_a_task_says_where_it_runs_before_its_step_is_loaded(ray_cluster: None, tmp_path: Path) -> None:
    """A node that is cut off while it imports torch is known by then, and nobody has to wait for it in silence."""
    mark = tmp_path / "load"
    executor = RayExecutor(SlowToLoad(mark), str(tmp_path / "ray"))
    executor.submit(task("a", number=2))
    deadline = time.monotonic() + 60
    while not (node := next(iter(executor._in_flight.values())).node):
        assert executor.wait(0.5) == []
        assert time.monotonic() < deadline
    assert node in {one["NodeID"] for one in ray.nodes()}
    mark.touch()
    [(_, end)] = executor.wait(60)
    assert isinstance(end, TaskRecord)
    executor.close()


def test_a_task_that_says_nothing_since_a_node_was_lost_is_given_up(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is cut off in the moment in which a task begins there: the driver never hears where it runs."""

    def silence(_request: object) -> Iterator[object]:
        time.sleep(60)
        yield

    silent = ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")(silence)
    monkeypatch.setattr("fleetpress.jobs.executors.ray._run_remote", silent)
    monkeypatch.setattr("fleetpress.jobs.executors.ray._SILENCE_SECONDS", 0.3)
    [node] = ray.nodes()
    nodes = [node, {**node, "NodeID": "other"}]
    monkeypatch.setattr("fleetpress.jobs.executors.ray_cluster._living_nodes", lambda: list(nodes))
    executor = RayExecutor(step, str(tmp_path / "ray"))
    executor.submit(task("quiet"))
    assert executor.wait(0.8) == []
    nodes.pop()
    [(name, end)] = executor.wait(20)
    assert isinstance(end, Failure)
    assert (name, end.error_class) == ("quiet", "lost")
    assert end.reason == "quantize did not begin: a node was lost, and it may have been there"
    executor.close()


def test_a_task_that_no_node_has_room_for_any_more_is_given_up_after_a_while(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = RayExecutor(step, str(tmp_path / "ray"), grace_seconds=0.3)
    for name in ("one", "other", "waits"):
        executor.submit(replace(task(name, do="sleep"), memory_bytes=2**20))
    while sum(bool(flight.node) for flight in executor._in_flight.values()) < 2:  # they have begun
        assert executor.wait(0.2) == []
    assert executor.wait(0.8) == []
    [node] = ray.nodes()
    small = {**node, "Resources": {"CPU": 1.0, "memory": 1.0}}
    monkeypatch.setattr("fleetpress.jobs.executors.ray_cluster._living_nodes", lambda: [small])
    [(name, end)] = executor.wait(20)
    assert isinstance(end, Failure)
    assert (name, end.error_class) == ("waits", "input")
    assert "which the cluster can never give" in end.reason
    executor.close()


def test_a_head_that_does_not_answer_ends_the_run(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetpress.jobs.executors.ray_cluster._HEAD_SECONDS", 2.0)
    executor = RayExecutor(step, str(tmp_path / "ray"))
    executor.submit(task("a", do="sleep"))
    silent = threading.Event()

    def hang() -> list[dict[str, object]]:
        silent.wait(60)
        raise ConnectionError

    monkeypatch.setattr("fleetpress.jobs.executors.ray_cluster._living_nodes", hang)
    with pytest.raises(ClusterUnreachable, match="the head of the Ray cluster is gone"):
        executor.wait(30)
    handles = list(executor._in_flight)
    executor.close()  # asks nothing of a cluster that is gone
    silent.set()
    monkeypatch.undo()
    for handle in handles:
        ray.cancel(handle, force=True)
    again = RayExecutor(step, str(tmp_path / "ray"))
    drain(again, [task("b", number=1)])
    again.close()
