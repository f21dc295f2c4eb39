"""The Ray matrix: a fleet on real clusters of several nodes while processes, nodes and networks die.

    python benchmarks/ray_matrix/matrix.py [--only PATTERN] [--json]

Every fault has a cluster of its own. A run that the fault ended is given again. In the end the artifacts must be those
of a quiet run in one process, byte for byte. The columns: exit codes of the runs; models missing (lost); artifacts
beyond one per model (doubled); how often tasks began again (again); and what the run said. Exit code 1 if anything is
lost, doubled, wrong or done twice, or the reason was not named.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cut_off import CutOff, missing
from matrix_fleet import HUNGRY, Driver, Ended, write_fleet, write_spec
from ray_hosts import Hosts

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from fault_fleet import published

MODELS = 4
EPOCHS = 150  # a second or two


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a fault did."""

    fault: str
    codes: tuple[int, ...]
    lost: int
    doubled: int
    wrong: tuple[str, ...]
    again: int
    seconds: float
    reason: str
    problem: str


class Matrix:
    """The fleet in a folder, and what a quiet run of it publishes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = str(folder / "in")
        write_fleet(self.source, MODELS)
        end = Driver(self.spec("quiet"), ["--executor", "inline"], {}).ended()
        self.quiet = published(str(folder / "quiet"))
        if end.code or len(self.quiet.artifacts) != MODELS:
            raise RuntimeError(f"the quiet run went wrong:\n{end.said}")

    def spec(self, name: str, *, memory: str = "2GiB", more: str = "") -> Path:
        """A spec whose output has this name."""
        path = self.folder / f"{name}.yaml"
        return write_spec(path, self.source, str(self.folder / name), epochs=EPOCHS, memory=memory, more=more)

    def row(self, name: str, fault: "Fault", reason: str) -> Row:
        """One fault, the runs that it takes, and the comparison; a line of theirs must match `reason`."""
        started = time.monotonic()
        ends, problem = fault(self, name)
        found = published(str(self.folder / name))
        wrong = tuple(found.wrong(self.quiet))
        total: Counter[str] = sum((end.started for end in ends), Counter())
        again = sum(count - 1 for count in total.values())
        lost, doubled = found.lost(self.quiet), found.doubled()
        if not problem and (lost or doubled or wrong):
            problem = f"lost {lost}, doubled {doubled}, wrong {', '.join(wrong) or 'none'}"
        twice = sum((end.finished for end in ends), Counter()) - Counter(total.keys())
        if not problem and twice:
            problem = f"done more than once: {', '.join(twice)}"
        said = [line for end in ends for line in end.said.splitlines() if reason and re.search(reason, line)]
        if not problem and not said and reason:
            problem = f"no line has {reason!r} in it:\n{ends[0].said[-2000:]}"
        return Row(
            fault=name,
            codes=tuple(end.code for end in ends),
            lost=lost,
            doubled=doubled,
            wrong=wrong,
            again=again,
            seconds=round(time.monotonic() - started, 1),
            reason=said[0] if said else "",
            problem=problem,
        )


Fault = Callable[[Matrix, str], tuple[list[Ended], str]]


@contextmanager
def _driven(matrix: Matrix, spec: Path) -> Iterator[tuple[Hosts, Driver]]:
    with Hosts(nodes=2, cpus=1) as hosts:
        yield hosts, Driver(spec, ["--address", hosts.address], hosts.environment)


def _expect(ends: Sequence[Ended], *codes: int) -> str:
    found = tuple(end.code for end in ends)
    return "" if found == codes else f"exit codes {found} instead of {codes}:\n{ends[-1].said[-2000:]}"


def _again(spec: Path) -> Ended:
    with Hosts(nodes=2, cpus=1) as hosts:
        return Driver(spec, ["--address", hosts.address], hosts.environment).ended()


def worker_killed(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """SIGKILL of a worker while it trains."""
    with _driven(matrix, matrix.spec(name)) as (hosts, driver):
        hosts.kill_worker("train")
        ends = [driver.ended()]
    return ends, _expect(ends, 0)


def node_killed(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """SIGKILL of a node while its worker trains; one node is left."""
    with _driven(matrix, matrix.spec(name)) as (hosts, driver):
        hosts.kill_node("train")
        ends = [driver.ended()]
    return ends, _expect(ends, 0)


def driver_killed(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """SIGKILL of the driver; the same cluster is used again."""
    spec = matrix.spec(name)
    with _driven(matrix, spec) as (hosts, driver):
        hosts.kill_worker("train")  # and its task is never told
        driver.process.kill()
        ends = [driver.ended()]
        ends.append(Driver(spec, ["--address", hosts.address], hosts.environment).ended())
    return ends, _expect(ends, -signal.SIGKILL, 0)


def driver_terminated(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """SIGTERM of the driver: it ends in a consistent state and says how to go on."""
    spec = matrix.spec(name)
    with _driven(matrix, spec) as (hosts, driver):
        hosts.kill_worker("train")
        driver.process.send_signal(signal.SIGTERM)
        ends = [driver.ended()]
        ends.append(Driver(spec, ["--address", hosts.address], hosts.environment).ended())
    return ends, _expect(ends, 130, 0)


def head_killed(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """SIGKILL of everything of the head; then another cluster."""
    spec = matrix.spec(name)
    with _driven(matrix, spec) as (hosts, driver):
        hosts.kill_worker("train")
        hosts.kill_head()
        ends = [driver.ended()]
    ends.append(_again(spec))
    return ends, _expect(ends, 5, 0)


def over_its_memory(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """A model whose data unpacks to more than a task may use; the others are published."""
    spec = matrix.spec(name, memory="512MiB", more=HUNGRY)
    with _driven(matrix, spec) as (_, driver):
        ends = [driver.ended()]
    return ends, _expect(ends, 3)


def without_room(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """Tasks that ask for what no node has; then for less."""
    spec = matrix.spec(name, memory="100TB")
    with _driven(matrix, spec) as (hosts, driver):
        ends = [driver.ended()]
        spec = matrix.spec(name)
        ends.append(Driver(spec, ["--address", hosts.address], hosts.environment).ended())
    return ends, _expect(ends, 4, 0)


def node_cut_off(matrix: Matrix, name: str) -> tuple[list[Ended], str]:
    """A node is cut off from the network while it trains, and comes back when the run is over."""
    if missing():
        return [], f"not tried: {missing()}"
    spec = matrix.spec(name)
    with CutOff() as cable:
        driver = Driver(spec, ["--address", cable.address], cable.environment, prefix=cable.inside())
        cable.wait_for_work()
        cable.unplug()
        ends = [driver.ended()]
        cable.plug()
        ends.append(
            Driver(spec, ["--address", cable.address], cable.environment, prefix=cable.inside()).ended()
        )
    return ends, _expect(ends, 0, 0)


# What does it, and how the reason must be named; a driver that was killed says nothing.
FAULTS: dict[str, tuple[Fault, str]] = {
    "a worker is killed": (worker_killed, "its worker process died"),
    "a node is killed": (node_killed, "its node died|node was lost"),
    "the driver is killed": (driver_killed, ""),
    "the driver gets SIGTERM": (driver_terminated, "interrupted; what is done is kept. Resume with"),
    "the head is killed": (head_killed, "the head of the Ray cluster is gone"),
    "a node is cut off": (node_cut_off, "its node died|node was lost"),
    "a task over its memory": (
        over_its_memory,
        r"hungry failed: train needs at least \d+ bytes .*more than the 536870912 ",
    ),
    "a task no node has room for": (without_room, "which the cluster can never give"),
}


def run_matrix(only: str = "") -> Iterator[Row]:
    """Rows as they come."""
    with tempfile.TemporaryDirectory(prefix="fleetpress-matrix-") as folder:
        matrix = Matrix(Path(folder))
        for name, (fault, reason) in FAULTS.items():
            if only in name:
                yield matrix.row(name, fault, reason)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the clusters are ended
    rows = []
    for row in run_matrix(arguments.only):
        rows.append(row)
        if not arguments.json:
            codes = " then ".join(map(str, row.codes))
            print(
                f"{row.fault:28} exit {codes:10} lost {row.lost} doubled {row.doubled} again {row.again}"
                f" {row.seconds:6.1f} s  {row.reason[:130]}{'  PROBLEM: ' + row.problem if row.problem else ''}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        bad = sum(bool(row.problem) for row in rows)
        print(
            f"{len(rows)} faults, {len(rows) - bad} survived, lost {sum(r.lost for r in rows)}, "
            f"doubled {sum(r.doubled for r in rows)}"
        )
    return int(any(row.problem for row in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main())
