"""Checkpoints from store to store, against the peer chain and against a run that computes nothing.

    python benchmarks/checkpoints/chain.py FOLDER [--parts s3 folder memory workers] [--pairs 5] [--peer VENV]

FOLDER keeps models and the S3 server's data; VENV (FOLDER/peer unless given) the peer's environment, made when missing.
Every run is a process of its own with a fresh output, which is deleted afterwards; sides run in turn, and the first
round, which warms caches up, is discarded. All times are of whole processes, imports included. The scheme is
W4A16_ASYM, embedding and head are left alone on both sides. Parts:

s3        S3 to S3: fleetpress inline, the same with the quantization left out (noop.py), and download, peer and upload
          (peer.py). SeaweedFS on loopback; its own CPU time is not counted.
folder    Folder to folder: fleetpress inline, and the peer.
memory    What a worker takes at most, S3 to S3: a model and one of twice the layers; a shard of 2.1 GB with tensors of
          600 MB under a ceiling of 512 MiB.
workers   One Ray worker and two, each connection through a relay that slows it down (relay.py). Clusters are started
          before the clock.

The ratio of two sides is the median of their ratios in each round, with the lowest and the highest.
"""

import argparse
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from markdown_table import table
from processes import Cost, measure
from runs import HERE, Job, Model, fleetpress, model, peer, peer_python, remove, say, stages, upload

from fleetpress.jobs.seaweed import SeaweedFS, start_seaweedfs

PARTS = ("s3", "folder", "memory", "workers")
OURS, NOTHING, PEER = "fleetpress", "nothing computed", "peer"
CEILING = "512MiB"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    folder: Path
    peer: Path
    pairs: int
    layers: int
    megabytes_per_second: float
    milliseconds: float


Rounds = dict[str, list[Cost]]


def rounds(sides: dict[str, Callable[[], Cost]], pairs: int) -> Rounds:
    """Costs of each side; one round more than `pairs`, whose figures are thrown away.

    Each round begins with another side, every other one goes backwards: what a run leaves to do hits all alike.
    """
    found: Rounds = {name: [] for name in sides}
    names = list(sides)
    for number in range(pairs + 1):
        first = number % len(names)
        for name in (names[first:] + names[:first])[:: 1 if number % 2 else -1]:
            cost = sides[name]()
            say(f"round {number}: {name} {cost.wall_seconds:.2f} s, {cost.cpu_seconds:.2f} s CPU")
            if number:
                found[name].append(cost)
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest-highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def print_costs(found: Rounds, gigabytes: float) -> None:
    """One row a side."""
    table(
        ("", "wall s", "CPU s", "CPU s/GB", "memory MB"),
        (
            (
                name,
                spread([cost.wall_seconds for cost in costs]),
                spread([cost.cpu_seconds for cost in costs]),
                spread([cost.cpu_seconds / gigabytes for cost in costs]),
                spread([cost.memory_bytes / 1e6 for cost in costs], 0),
            )
            for name, costs in found.items()
        ),
    )
    print()


def print_ratios(found: Rounds, pairs: Sequence[tuple[str, str]]) -> None:
    """One row a pair of sides."""

    def ratios(one: str, other: str, of: Callable[[Cost], float]) -> str:
        return spread([of(a) / of(b) for a, b in zip(found[one], found[other], strict=True)], 3)

    table(
        ("ratio", "wall", "CPU", "memory"),
        (
            (
                f"{one} / {other}",
                ratios(one, other, lambda cost: cost.wall_seconds),
                ratios(one, other, lambda cost: cost.cpu_seconds),
                ratios(one, other, lambda cost: cost.memory_bytes),
            )
            for one, other in pairs
        ),
    )
    print()


class Outputs:
    """Fresh places below one root, each deleted after its use."""

    def __init__(self, root: str) -> None:
        self._root = root

    @contextlib.contextmanager
    def fresh(self) -> Iterator[str]:
        """A place that nothing was written to."""
        place = f"{self._root}/output-{secrets.token_hex(4)}"
        yield place
        remove(place)


@contextlib.contextmanager
def server(options: Options) -> Iterator[tuple[SeaweedFS, str]]:
    """An S3 server, an empty bucket, and this process' AWS_* variables leading there."""
    with tempfile.TemporaryDirectory(dir=options.folder) as data, start_seaweedfs(data) as found:
        os.environ |= found.environment
        yield found, found.create_bucket("checkpoints")


def s3_part(options: Options) -> None:
    """Goals 1 and 3: wall and CPU time against the peer chain, wall time against nothing computed, stages."""
    one, python = model(options.folder, layers=options.layers), peer_python(options.peer)
    with server(options) as (_, bucket):
        source, outputs = upload(one, bucket), Outputs(bucket)
        told: list[dict[str, dict[str, float]]] = []

        def ours() -> Cost:
            with outputs.fresh() as output:
                cost = fleetpress(Job(source=source, output=output), options.folder)
                told.append(stages(output))
            return cost

        def nothing() -> Cost:
            with outputs.fresh() as output:
                return fleetpress(Job(source=source, output=output), options.folder, noop=True)

        def theirs() -> Cost:
            with outputs.fresh() as output:
                return peer(python, source, output)

        found = rounds({OURS: ours, NOTHING: nothing, PEER: theirs}, options.pairs)
    print(f"**S3 to S3**, {_of(one)}, {options.pairs} rounds\n")
    print_costs(found, one.bytes / 1e9)
    print_ratios(found, [(OURS, NOTHING), (OURS, PEER)])
    print_stages(told[1:])


def print_stages(told: Sequence[dict[str, dict[str, float]]]) -> None:
    """Bytes and seconds of each stage, as the records of the runs tell them; medians over the rounds."""
    if not told or not told[0]:
        print("The records tell no stages.\n")
        return

    def middle(stage: str, name: str) -> float:
        return statistics.median(one[stage].get(name, 0.0) for one in told)

    table(
        ("stage", "MB", "seconds", "CPU s"),
        (
            (
                stage,
                f"{middle(stage, 'bytes') / 1e6:.1f}",
                f"{middle(stage, 'seconds'):.2f}",
                f"{middle(stage, 'cpu_seconds'):.2f}",
            )
            for stage in told[0]
        ),
    )
    print()


def folder_part(options: Options) -> None:
    """Goal 2: wall and CPU time against the peer, whole processes."""
    one, python = model(options.folder, layers=options.layers), peer_python(options.peer)
    outputs = Outputs(str(options.folder))

    def ours() -> Cost:
        with outputs.fresh() as output:
            return fleetpress(Job(source=str(one.folder), output=output), options.folder)

    def theirs() -> Cost:
        with outputs.fresh() as output:
            return peer(python, str(one.folder), output)

    found = rounds({OURS: ours, PEER: theirs}, options.pairs)
    print(f"**Folder to folder**, {_of(one)}, {options.pairs} rounds\n")
    print_costs(found, one.bytes / 1e9)
    print_ratios(found, [(OURS, PEER)])


def memory_part(options: Options) -> None:
    """Goal 4: the most that a worker takes, by layers and by ceiling; the interpreter alone, and with torch."""
    one = model(options.folder, layers=options.layers)
    two, giant = model(options.folder, layers=2 * options.layers), model(options.folder, giant=True)
    rows: list[tuple[str, list[float]]] = []
    for name, code in (("interpreter", ""), ("interpreter and torch", "import torch, ")):
        bare = [sys.executable, "-c", f"{code or 'import '}time; time.sleep(0.2)"]
        rows.append((name, _memory(options, partial(measure, bare))))
    with server(options) as (_, bucket):
        outputs = Outputs(bucket)
        for each, ceiling in ((one, None), (two, None), (giant, CEILING)):
            source = upload(each, bucket)

            def run(source: str = source, ceiling: str | None = ceiling) -> Cost:
                with outputs.fresh() as output:
                    job = Job(source=source, output=output, memory_per_task=ceiling)
                    return fleetpress(job, options.folder)

            rows.append((f"{_of(each)}, ceiling {ceiling or 'as by default'}", _memory(options, run)))
            remove(source)
    print(f"**Memory of a worker at most**, S3 to S3, {options.pairs} runs\n")
    table(("", "MB"), ((name, spread(found, 0)) for name, found in rows))
    once, twice = rows[2][1], rows[3][1]
    print(f"\ntwice the layers / once: {statistics.median(twice) / statistics.median(once):.3f}\n")


def _memory(options: Options, run: Callable[[], Cost]) -> list[float]:
    return [run().memory_bytes / 1e6 for _ in range(options.pairs)]


def workers_part(options: Options) -> None:
    """Goal 5: one worker against two, where each connection has a limit of its own."""
    one = model(options.folder, layers=options.layers)
    told: dict[str, list[float]] = defaultdict(list)
    busy: list[float] = []
    with server(options) as (seaweedfs, bucket), ray_environment(), contextlib.ExitStack() as stack:
        source, outputs = upload(one, bucket), Outputs(bucket)
        addresses = {f"{cpus} worker(s)": stack.enter_context(cluster(cpus)) for cpus in (1, 2)}

        def run(name: str) -> Cost:
            with outputs.fresh() as output, relay(options, seaweedfs) as counted:
                cost = fleetpress(Job(source=source, output=output), options.folder, address=addresses[name])
            told[name].append(cost.json()["seconds"])
            busy.append(counted[-1]["cpu_seconds"] / cost.wall_seconds)
            say(f"  {told[name][-1]:.2f} s inside the run; through the relay: {json.dumps(counted[-1])}")
            return cost

        found = rounds({name: partial(run, name) for name in addresses}, options.pairs)
    print(
        f"**Workers**, {_of(one)}, {options.megabytes_per_second:g} MB/s a connection and direction,"
        f" {options.milliseconds:g} ms a request, {options.pairs} rounds\n"
    )
    inside = {name: seconds[1:] for name, seconds in told.items()}
    table(
        ("", "seconds of the run", "seconds of the whole driver"),
        (
            (name, spread(inside[name]), spread([cost.wall_seconds for cost in found[name]]))
            for name in addresses
        ),
    )
    single, double = addresses
    speedups = [a / b for a, b in zip(inside[single], inside[double], strict=True)]
    whole = [a.wall_seconds / b.wall_seconds for a, b in zip(found[single], found[double], strict=True)]
    print(
        f"\ntwo workers instead of one: {spread(speedups)} times as fast; with the driver's start {spread(whole)}"
    )
    print(f"the relay kept {max(busy):.2f} of a core busy at most\n")


@contextlib.contextmanager
def ray_environment() -> Iterator[None]:
    """The variables under which clusters and drivers stay on loopback and know each other by a token."""
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder, "token")
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for "every port on 127.0.0.1 only"
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        os.environ.pop("RAY_ADDRESS", None)
        yield


@contextlib.contextmanager
def cluster(cpus: int) -> Iterator[str]:
    """A Ray cluster of so many CPUs; gives its address."""
    process = subprocess.Popen(
        [sys.executable, HERE / "cluster.py", str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


@contextlib.contextmanager
def relay(options: Options, to: SeaweedFS) -> Iterator[list[dict[str, float]]]:
    """A relay to the server with the AWS_* variables leading through it; afterwards what went through is appended."""
    command = [sys.executable, str(HERE / "relay.py"), to.endpoint]
    command += ["--megabytes-per-second", str(options.megabytes_per_second)]
    command += ["--milliseconds", str(options.milliseconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    counted: list[dict[str, float]] = []
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
    try:
        yield counted
    finally:
        os.environ["AWS_ENDPOINT_URL"] = to.endpoint
        process.terminate()
        counted.append(json.loads(process.communicate()[0]))


def _of(one: Model) -> str:
    return f"{one.name} ({one.bytes / 1e9:.2f} GB)"


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count")
    parser.add_argument("--peer", type=Path, metavar="VENV")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--megabytes-per-second", type=float, default=100)
    parser.add_argument("--milliseconds", type=float, default=20)
    parsed = parser.parse_args()
    folder = parsed.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    options = Options(
        folder=folder,
        peer=(parsed.peer or folder / "peer").absolute(),
        pairs=parsed.pairs,
        layers=parsed.layers,
        megabytes_per_second=parsed.megabytes_per_second,
        milliseconds=parsed.milliseconds,
    )
    parts = {"s3": s3_part, "folder": folder_part, "memory": memory_part, "workers": workers_part}
    for name in parsed.parts:
        parts[name](options)


if __name__ == "__main__":
    main()
