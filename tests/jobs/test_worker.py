"""The border: every end of a step becomes a record or a failure of the right class."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fleetpress.compression.errors import TrainingDivergedError
from fleetpress.jobs.errors import ModelError
from fleetpress.jobs.ledger import Ledger
from fleetpress.jobs.programs import materials
from fleetpress.jobs.tasks import (
    Failure,
    Output,
    StepResult,
    Task,
    TaskRecord,
    failure_from_json,
    record_from_json,
    step_result_from_json,
    task_from_json,
    to_json,
)
from fleetpress.jobs.worker import execute
from fleetpress.storage.canonical_json import dumps
from fleetpress.storage.errors import InvalidModelFile, StoreUnreachable
from fleetpress.storage.store import open_store

TASK = Task(
    id="m/quantize/0", model="m", kind="quantize", digest="d1", needs=("a",), payload={"layers": ["fc"]}
)
OUTPUT = Output(key="records/d1.safetensors", bytes=3, sha256="ab")


def test_a_step_that_returns_is_recorded_by_the_worker(tmp_path: Path) -> None:
    def step(task: Task) -> StepResult:
        open_store(str(tmp_path)).put(OUTPUT.key, b"abc")
        return StepResult(result={"seen": list(task.payload["layers"])}, outputs=(OUTPUT,))

    end = execute(TASK, step, str(tmp_path), attempts=2)
    assert isinstance(end, TaskRecord)
    assert (end.task, end.model, end.kind, end.digest, end.attempts) == (TASK.id, "m", "quantize", "d1", 2)
    assert end.result == {"seen": ["fc"]}
    assert 0 <= end.seconds < 60
    assert Ledger(open_store(str(tmp_path))).find("d1") == end


def test_an_end_tells_where_the_task_ran_and_what_it_moved(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("in", b"12345")

    def step(task: Task) -> StepResult:
        store.put("out", store.get("in")[:3])
        if task.payload.get("fail"):
            raise ModelError("no")
        return StepResult(result={})

    end = execute(TASK, step, str(tmp_path), where="here")
    assert (end.where, end.bytes_read, end.bytes_written) == ("here", 5, 3)
    failed = execute(replace(TASK, payload={"fail": True}), step, str(tmp_path), where="here")
    assert isinstance(failed, Failure)
    assert (failed.where, failed.bytes_read, failed.bytes_written) == ("here", 5, 3)
    assert failed.seconds > 0


def test_records_of_older_versions_are_read() -> None:
    record = TaskRecord(
        task="t",
        model="m",
        kind="k",
        digest="d",
        outputs=(),
        result={},
        seconds=1.0,
        fleetpress_version="0.3.0",
    )
    old = {
        name: value
        for name, value in to_json(record).items()
        if name not in ("where", "bytes_read", "bytes_written")
    }
    assert record_from_json(old) == record
    with pytest.raises(ValueError, match="bytes_read"):
        record_from_json(old | {"bytes_read": "many"})


@pytest.mark.parametrize(
    ("error", "error_class", "reason"),
    [
        (ModelError("m: no data"), "input", "m: no data"),
        (TrainingDivergedError("loss is NaN\nat batch 3"), "input", "loss is NaN at batch 3"),
        (InvalidModelFile("truncated"), "input", "truncated"),
        (StoreUnreachable("no answer"), "transient", "no answer"),
        (ConnectionError("a worker died"), "transient", "a worker died"),
        (
            MemoryError(),
            "memory",
            "quantize ran out of memory (MemoryError): raise resources.memory_per_task",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory", "quantize ran out of memory"),
        (RuntimeError("mat1 and mat2"), "bug", "internal error in quantize: RuntimeError: mat1 and mat2"),
        (KeyError("fc"), "bug", "internal error in quantize: KeyError: 'fc'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_a_step_raises_is_classified(
    error: Exception, error_class: str, reason: str, tmp_path: Path
) -> None:
    def step(_task: Task) -> StepResult:
        raise error

    end = execute(TASK, step, str(tmp_path))
    assert isinstance(end, Failure)
    assert (end.task, end.model, end.error_class) == (TASK.id, "m", error_class)
    assert end.reason.startswith(reason)
    assert "\n" not in end.reason
    assert ("Traceback" in end.details) == (error_class == "bug")
    assert Ledger(open_store(str(tmp_path))).find("d1") is None


def test_torch_running_out_of_memory_is_recognised(tmp_path: Path) -> None:
    def step(_task: Task) -> StepResult:
        return StepResult(result={"n": torch.empty(2**50, dtype=torch.uint8).numel()})

    end = execute(TASK, step, str(tmp_path))
    assert isinstance(end, Failure)
    assert end.error_class == "memory"


def test_a_small_task_gives_up_what_large_ones_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(materials, "forget", lambda: forgotten.append("all"))
    for task in (TASK, replace(TASK, small=True)):
        execute(task, lambda _task: StepResult(result={}), str(tmp_path))
    assert forgotten == ["all"]


def test_an_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    def step(_task: Task) -> StepResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(TASK, step, str(tmp_path))


def test_a_ledger_that_cannot_be_written_fails_the_task_and_not_the_worker(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    end = execute(TASK, lambda _: StepResult(result={}), str(tmp_path / "file"))
    assert isinstance(end, Failure)
    assert end.error_class == "input"


def test_a_result_that_is_no_json_is_our_bug(tmp_path: Path) -> None:
    end = execute(TASK, lambda _: StepResult(result={"loss": float("nan")}), str(tmp_path))
    assert isinstance(end, Failure)
    assert end.error_class == "bug"


def test_steps_run_on_one_thread(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    end = execute(TASK, lambda _: StepResult(result={"threads": torch.get_num_threads()}), str(tmp_path))
    assert isinstance(end, TaskRecord)
    assert end.result["threads"] == 1


def test_values_survive_json() -> None:
    import json

    record = TaskRecord(
        task="t",
        model="m",
        kind="k",
        digest="d",
        outputs=(OUTPUT,),
        result={"a": [1, {"b": None}]},
        seconds=0.5,
        fleetpress_version="0.1.0",
    )
    result = StepResult(result={"a": 1}, outputs=(OUTPUT,))
    trouble = Failure(task="t", model="m", reason="why", error_class="memory", details="x")
    for value, read in (
        (TASK, task_from_json),
        (record, record_from_json),
        (trouble, failure_from_json),
        (result, step_result_from_json),
    ):
        assert read(json.loads(dumps(to_json(value)))) == value
