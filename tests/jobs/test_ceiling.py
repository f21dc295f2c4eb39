"""The memory that a task declared is all it gets: real limits, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from fleetpress.jobs.ceiling import ceiling, data_bytes
from fleetpress.jobs.tasks import Failure, StepResult, Task
from fleetpress.jobs.worker import execute

pytestmark = pytest.mark.skipif(data_bytes() is None, reason="only Linux counts a process' private memory")
MIB = 1 << 20


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_may_grow_by_what_was_declared_and_no_more() -> None:
    print_of = run(
        "from fleetpress.jobs.ceiling import ceiling, needed_bytes\n"
        "M = 1 << 20\n"
        "with ceiling(200 * M):\n"
        "    kept = bytearray(150 * M)\n"
        "    try:\n"
        "        bytearray(250 * M)\n"
        "    except MemoryError as error:\n"
        "        print('refused', needed_bytes(error) >= 150 * M)\n"
        "bytearray(250 * M)\n"
        "print('free again')"
    )
    assert print_of == "refused True\nfree again"


def test_tasks_side_by_side_share_the_sum_of_theirs() -> None:
    print_of = run(
        "from fleetpress.jobs.ceiling import ceiling\n"
        "M = 1 << 20\n"
        "with ceiling(200 * M), ceiling(200 * M):\n"
        "    kept = bytearray(350 * M)\n"
        "    try:\n"
        "        bytearray(250 * M)\n"
        "    except MemoryError:\n"
        "        print('refused')\n"
    )
    assert print_of == "refused"


def test_the_limit_of_before_comes_back_after_an_error() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    inside = []

    def step() -> None:
        with ceiling(64 * MIB):
            inside.append(resource.getrlimit(resource.RLIMIT_DATA))
            raise KeyError

    with pytest.raises(KeyError):
        step()
    assert inside != [before]
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize("library", ["python", "numpy", "torch"])
def test_a_step_that_takes_more_fails_alone_and_says_how_much_it_needed(library: str, tmp_path: Path) -> None:
    import numpy
    import torch

    makers = {
        "python": lambda: bytearray(600 * MIB),
        "numpy": lambda: numpy.zeros(600 * MIB, dtype="u1"),
        "torch": lambda: torch.zeros(600 * MIB, dtype=torch.uint8),
    }
    task = Task(id="m/quantize", model="m", kind="quantize", digest="d", memory_bytes=128 * MIB)

    def step(_task: Task) -> StepResult:
        kept = bytearray(100 * MIB)
        return StepResult(result={"sizes": [len(kept), len(makers[library]())]})

    end = execute(task, step, str(tmp_path))
    assert isinstance(end, Failure)
    assert end.error_class == "memory"
    assert "resources.memory_per_task" in end.reason
    if library == "torch":  # which says how much it asked for
        needed = int(end.reason.split("needs at least ")[1].split()[0])
        assert 700 * MIB <= needed < 900 * MIB
        assert f"more than the {128 * MIB}" in end.reason
