"""A run in one process, watched from another one that knows the bucket only."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleetpress.jobs.runs.results import (
    EVENTS,
    RUNS,
    read_result,
    run_ids,
)
from fleetpress.jobs.spec.fleet_spec import Spec
from fleetpress.storage.store import open_store

COMMAND = [sys.executable, "-c", "import sys; from fleetpress.jobs.cli import main; sys.exit(main())"]


@contextmanager
def begun(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture
def written(tmp_path: Path, fleet_at: Callable[..., Spec], spec_text: str) -> Spec:
    """The small fleet with a model that is broken, and its spec in a file."""
    spec = fleet_at(tmp_path, spec_text)
    (tmp_path / "models" / "broken.pt2").write_bytes(b"PK")
    (tmp_path / "spec.yaml").write_text(spec_text.format(place=tmp_path))
    return spec


def test_a_run_is_watched_from_elsewhere(tmp_path: Path, written: Spec) -> None:
    store = open_store(written.output)
    with begun("run", str(tmp_path / "spec.yaml"), "--executor", "inline", "--log-format", "json") as run:
        deadline = time.monotonic() + 60
        while not run_ids(store) and time.monotonic() < deadline:
            time.sleep(0.05)
        with begun("status", written.output, "--watch", "--json", "--log-format", "json") as watcher:
            seen, said = watcher.communicate(timeout=120)
        _, told = run.communicate(timeout=60)
    assert (run.returncode, watcher.returncode) == (3, 3)
    result = read_result(store)
    assert json.loads(seen) == result.as_dict()
    lines = [json.loads(line) for line in said.splitlines()]
    assert {line["run"] for line in lines} == {result.run}
    states = {line["model"]: line["kind"] for line in lines if "model" in line}
    assert set(states.items()) <= {(model.name, model.state) for model in result.models}
    assert "cnn" in states

    kept = [json.loads(line) for line in store.get(f"{RUNS}{result.run}/{EVENTS}").splitlines()]
    logged = [json.loads(line) for line in told.splitlines()]
    assert all(line.pop("run") == result.run and line.pop("time") for line in logged)
    assert logged == kept
    ended = [event for event in kept if event["kind"] == "finished"]
    assert {event["where"] for event in ended} == {"inline"}
    assert {event["step"] for event in ended} == {"collect", "prune", "finetune", "quantize", "publish"}
    assert sum(event.get("bytes_read", 0) for event in kept) == result.bytes_read > 0
    assert sum(event.get("bytes_written", 0) for event in kept) == result.bytes_written > 0
    assert (result.executor, result.tasks_left) == ("inline", 0)
    assert result.tasks_total > len(ended)  # the broken model's


def test_a_driver_that_died_is_told(tmp_path: Path, written: Spec, spec_text: str) -> None:
    text = spec_text.replace("epochs: 2", "epochs: 100000")
    (tmp_path / "spec.yaml").write_text(text.format(place=tmp_path))
    with begun("run", str(tmp_path / "spec.yaml"), "--executor", "inline") as run:
        assert run.stderr is not None
        assert any("finetune started" in line for line in run.stderr)
    run.wait(10)
    code = (
        "import sys; from fleetpress.jobs.runs import watching; from fleetpress.jobs.cli import main;"
        "watching._PATIENCE_SECONDS = 1.0; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", written.output, "--watch"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 130
    assert "shows no sign of life" in done.stderr
    assert "run the spec again to go on" in done.stderr
    assert "Traceback" not in done.stderr
