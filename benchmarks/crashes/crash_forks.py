"""Runs of the command line that crash: each a process of its own, forked from one that has loaded all and runs nothing.

    with Runs() as runs:
        (outcome,) = runs.at_once(Order(arguments=("run", "spec.yaml"), mode="killed after", at=17))

Tasks, parts and requests are cut small, so that a checkpoint of some kB takes the road of one of some TB; waits between
tries and the time spent on measuring speed are short, and no file is forced to the disk: what the kernel has of a
process that dies is not lost. Nothing else differs from `fleetpress` itself.
"""

import atexit
import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from crash_store import Fault, Troubled
from fork_server import ForkServer, load_everything, load_transformers

LAYOUT = {"SHARD_BYTES": 30_000, "TASK_BYTES": 4_000, "PART_BYTES": 600, "_SMALL_BYTES": 256}
ONE_PUT_BYTES = 1_000  # larger shards go up in parts
BLOCK_BYTES = 1_500  # of one request
CHUNK_BYTES = 1_000  # of data that one task collects from: each of two shards is more
GROUP_BYTES = 20_000  # of a program's file for each task that quantizes: two of them
SOLVE_BYTES = 2_000  # of the matrices that one task solves: several tasks a block
_LONGEST_RUN_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Order:
    """A command line, and the trouble it is to meet (see `crash_store`)."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    import_from: str = ""
    mode: str = ""
    at: int = 0
    blind: bool = False
    pauses: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run: its exit code, what it said, and what it noted of its tasks and its fault.

    Notes: {"event": "start", "digest", "task", "recorded"}, {"event": "end", "digest", "recorded"}, {"event": "fault",
    "operation", "in_flight"}, {"event": "count", "operations"}.
    """

    code: int
    out: str
    err: str
    notes: tuple[dict[str, Any], ...]

    def noted(self, event: str) -> list[dict[str, Any]]:
        """The notes of one kind."""
        return [note for note in self.notes if note["event"] == event]


class Runs(ForkServer):
    """The process that forks, from entering to leaving the context; used by one thread at a time."""

    def __init__(self, *, transformers: bool = False) -> None:
        super().__init__(__file__, 2 * _LONGEST_RUN_SECONDS, *(["transformers"] if transformers else []))

    def at_once(self, *orders: Order) -> list[Outcome]:
        """All of them side by side, to their ends. Raises TimeoutError."""
        folders = [Path(self._folder.name, str(index)) for index, _ in enumerate(orders)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
            for file in folder.iterdir():
                file.unlink()
        told = [{**asdict(order), "folder": str(f)} for order, f in zip(orders, folders, strict=True)]
        codes = self.ask(told, str(orders))
        if -signal.SIGALRM in codes:
            raise TimeoutError(f"longer than {_LONGEST_RUN_SECONDS} s: {orders}")
        return [_outcome(code, folder) for code, folder in zip(codes, folders, strict=True)]


@functools.cache
def shared_runs() -> Runs:
    """One for all tests of this process; it ends with it."""
    runs = Runs().__enter__()
    atexit.register(runs.__exit__)
    return runs


def _outcome(code: int, folder: Path) -> Outcome:
    notes = (folder / "notes").read_text().splitlines() if (folder / "notes").exists() else []
    return Outcome(
        code=code,
        out=(folder / "out").read_text(),
        err=(folder / "err").read_text(),
        notes=tuple(map(json.loads, notes)),
    )


def _serve() -> None:
    """Fork for every order of a line on stdin; answer with the exit codes."""
    if "transformers" in sys.argv:
        load_transformers()
    load_everything()
    for line in sys.stdin:
        children = [_forked(order) for order in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def _forked(order: Mapping[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _obey(order)
        except BaseException:  # noqa: BLE001 - a child never comes back
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _obey(order: Mapping[str, Any]) -> int:
    """The child: the command line among its troubles, what it says in files."""
    from fleetpress.jobs.cli import main
    from fleetpress.storage import store as stores

    signal.alarm(_LONGEST_RUN_SECONDS)
    os.environ.update(order["environment"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if order["import_from"]:
        sys.path.insert(0, order["import_from"])
    notebook = _Notebook(f"{order['folder']}/notes")
    fault = Fault(order["mode"], order["at"], notebook.note, pauses=order["pauses"])
    new_store = stores._new_store
    stores._new_store = lambda place: Troubled(new_store(place), fault, blind=order["blind"])  # type: ignore[assignment,return-value]
    os.fsync = lambda _: None  # type: ignore[assignment]
    _cut_small()
    _watch(notebook, new_store)
    try:
        return main(order["arguments"])
    finally:
        notebook.note({"event": "count", "operations": fault.count})


class _Notebook:
    """Notes in a file, each written before the process may die; keeps in mind what tasks are under way."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._in_flight: list[str] = []
        self._lock = threading.Lock()

    def note(self, fields: dict[str, Any]) -> None:
        """Write down one event."""
        with self._lock:
            if fields["event"] == "start":
                self._in_flight.append(fields["digest"])
            elif fields["event"] == "end":
                self._in_flight.remove(fields["digest"])
            elif fields["event"] == "fault":
                fields = {**fields, "in_flight": list(self._in_flight)}
            os.write(self._file, json.dumps(fields).encode() + b"\n")


def _watch(notebook: _Notebook, new_store: Any) -> None:
    """Note the start and the end of every task, and whether it had a record that holds; past all faults."""
    from fleetpress.jobs.executors import inline
    from fleetpress.jobs.ledger import Ledger
    from fleetpress.jobs.tasks import TaskRecord

    execute = inline.execute

    def watched(task: Any, run_step: Any, ledger_uri: str, **options: Any) -> Any:
        known = Ledger(new_store(ledger_uri)).find(task.digest) is not None
        about = {"digest": task.digest, "task": task.id}
        notebook.note({"event": "start", "recorded": known, **about})
        end = execute(task, run_step, ledger_uri, **options)
        notebook.note({"event": "end", "recorded": isinstance(end, TaskRecord), **about})
        return end

    inline.execute = watched


def _cut_small() -> None:
    from fleetpress.jobs.checkpoint import layout, steps, tasks
    from fleetpress.jobs.driver import scheduler, work
    from fleetpress.jobs.planning import plan_builder
    from fleetpress.jobs.programs import publishing

    for name, size in LAYOUT.items():
        setattr(layout, name, size)
    steps.ONE_PUT_BYTES = ONE_PUT_BYTES
    if "transformers" in sys.modules:
        from fleetpress.jobs.checkpoint import calibrating

        calibrating.SOLVE_BYTES = SOLVE_BYTES
    tasks.block_bytes = lambda _: BLOCK_BYTES
    plan_builder.CHUNK_BYTES = CHUNK_BYTES
    plan_builder.GROUP_BYTES = GROUP_BYTES
    publishing._LATENCY_SECONDS = 0.0
    scheduler._FIRST_DELAY_SECONDS = 0.01
    work._ASK_AGAIN_SECONDS = 0.05


if __name__ == "__main__":
    _serve()
