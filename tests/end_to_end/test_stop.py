"""Ctrl-C, SIGTERM and `cancel`: the run ends in seconds, says how to go on, and leaves nothing in anybody's way."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleetpress.jobs import run_fleet
from fleetpress.jobs.runs.events import Event
from fleetpress.jobs.runs.heartbeat import cancel_key
from fleetpress.jobs.runs.progress import Progress
from fleetpress.jobs.runs.results import read_result
from fleetpress.jobs.spec.fleet_spec import Spec
from fleetpress.storage.store import open_store

LONG = "train: {{epochs: 100000, batch_size: 64}}"  # hours, unless something ends it
QUICK = "collect: {{batch_size: 64}}"


@pytest.fixture
def spec_file(
    tmp_path: Path, fleet_at: Callable[..., Spec], spec_text: str
) -> Callable[[str], tuple[Path, Spec]]:
    def write(begin: str) -> tuple[Path, Spec]:
        assert QUICK in spec_text
        text = spec_text.replace(QUICK, begin)
        spec = fleet_at(tmp_path, text)
        (tmp_path / "spec.yaml").write_text(text.format(place=tmp_path))
        return tmp_path / "spec.yaml", spec

    return write


def started(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if "train started" in line:
            return


def test_sigterm_ends_the_run_and_says_how_to_go_on(
    spec_file: Callable[[str], tuple[Path, Spec]],
) -> None:
    """Ctrl-C: bad_input/test_bad_commands.py."""
    path, spec = spec_file(LONG)
    command = [sys.executable, "-c", "import sys; from fleetpress.jobs.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "run", str(path), "--executor", "inline"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert any("train started" in line for line in started(process))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"Resume with: fleetpress run {path}" in errors
    assert "Traceback" not in errors
    store = open_store(spec.output)
    assert read_result(store).state == "interrupted"
    assert [key for key in store.sizes() if "alive" in key or key.startswith("leases/")] == []


def test_the_wish_to_cancel_ends_the_run(
    spec_file: Callable[[str], tuple[Path, Spec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetpress.jobs.runs.heartbeat.BEAT_SECONDS", 0.1)
    _, spec = spec_file(LONG)
    store = open_store(spec.output)

    def listen(event: Event, progress: Progress) -> None:
        if event.kind == "started":
            store.put(cancel_key(progress.run), b"{}")

    result = run_fleet(spec, executor="inline", listener=listen)
    assert (result.state, result.exit_code) == ("interrupted", 130)
    assert [
        key for key in store.sizes() if "alive" in key or "cancel" in key or key.startswith("leases/")
    ] == []


def test_a_driver_in_another_thread_is_cancelled_between_two_tasks(
    spec_file: Callable[[str], tuple[Path, Spec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetpress.jobs.runs.heartbeat.BEAT_SECONDS", 0.05)
    _, spec = spec_file(QUICK)
    store = open_store(spec.output)
    states: list[str] = []

    def listen(event: Event, progress: Progress) -> None:
        if event.kind == "started" and event.task and event.task.endswith("/collect"):
            store.put(cancel_key(progress.run), b"{}")
            time.sleep(1.0)  # many beats: the wish was heard before the next task

    thread = threading.Thread(
        target=lambda: states.append(run_fleet(spec, executor="inline", listener=listen).state)
    )
    thread.start()
    thread.join(60)
    assert states == ["interrupted"]
    again = run_fleet(spec, executor="inline")
    assert again.exit_code == 0


def test_a_program_with_a_handler_of_its_own_keeps_it(
    spec_file: Callable[[str], tuple[Path, Spec]],
) -> None:
    _, spec = spec_file(QUICK)

    def own(_number: int, _frame: object) -> None:
        """Of the program that embeds a run."""

    handlers: set[object] = set()
    before = signal.signal(signal.SIGTERM, own)
    try:
        run_fleet(spec, executor="inline", listener=lambda *_: handlers.add(signal.getsignal(signal.SIGTERM)))
        assert handlers == {own}
    finally:
        signal.signal(signal.SIGTERM, before)
