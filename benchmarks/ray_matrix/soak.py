"""A fleet of 200 models while workers and nodes die at random and the store throttles and breaks off.

    python benchmarks/ray_matrix/soak.py [--models 200] [--seed 0] [--json]

A real S3 server behind a relay that refuses and resets requests, a Ray cluster of three nodes. Every few seconds the
worker of some node is killed, from time to time a whole node, which another one replaces. A run that gives up models is
given again. In the end all artifacts must be those of a quiet run in one process, byte for byte, and no task may have
been done twice. Exit code 1 if not, or if some kind of trouble never came.
"""

import argparse
import json
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

from matrix_fleet import Driver, Ended, write_fleet, write_spec
from ray_hosts import Hosts

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from fault_fleet import published
from fault_relay import FaultRelay, Refuse, Reset, Rule

from fleetpress.jobs.seaweed import SeaweedFS, start_seaweedfs

WORKER_SECONDS = 3.0
NODE_SECONDS = 25.0
EPOCHS = 2
_MOST_RUNS = 5
_LONGEST_RUN_SECONDS = 1800  # then it is left in peace, and must end


@dataclass(kw_only=True)
class Counts:
    """What happened, and what came of it."""

    models: int
    runs: int = 0
    workers_killed: int = 0
    nodes_killed: int = 0
    requests_refused: int = 0
    requests_reset: int = 0
    tasks: int = 0
    tries_again: int = 0
    failed_in_a_run: int = 0
    done_twice: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    seconds: float = 0.0
    seconds_quiet: float = 0.0


def soak(models: int, seed: int) -> Counts:
    """The quiet run and the other one, compared."""
    pick, counts, finished = random.Random(seed), Counts(models=models), Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix="fleetpress-soak-") as folder,
        start_seaweedfs(Path(folder, "server")) as server,
        patch.dict("os.environ", server.environment),
    ):
        place = f"{server.create_bucket(f'soak-{secrets.token_hex(4)}')}/soak"
        write_fleet(f"{place}/in", models)
        started = time.monotonic()
        quiet_spec = write_spec(Path(folder, "quiet.yaml"), f"{place}/in", f"{place}/quiet", epochs=EPOCHS)
        quiet = Driver(quiet_spec, ["--executor", "inline"], server.environment).ended()
        counts.seconds_quiet = round(time.monotonic() - started, 1)
        if quiet.code:
            raise RuntimeError(f"the quiet run went wrong:\n{quiet.said[-2000:]}")
        spec = write_spec(Path(folder, "soak.yaml"), f"{place}/in", f"{place}/out", epochs=EPOCHS)
        started = time.monotonic()
        _disturbed(spec, server, pick, counts, finished)
        counts.seconds = round(time.monotonic() - started, 1)
        wanted, found = published(f"{place}/quiet"), published(f"{place}/out")
    if len(wanted.artifacts) != models:
        raise RuntimeError(f"the quiet run published {len(wanted.artifacts)} of {models} models")
    counts.lost, counts.doubled = found.lost(wanted), found.doubled()
    counts.wrong = len(found.wrong(wanted))
    counts.tasks, counts.done_twice = len(finished), finished.total() - len(finished)
    return counts


def _disturbed(
    spec: Path, server: SeaweedFS, pick: random.Random, counts: Counts, finished: Counter[str]
) -> None:
    """Runs until one ends well; counts in `finished` how often each task was."""
    with FaultRelay(server.endpoint) as relay:
        slow = Rule(name="SlowDown", fault=Refuse(503, "SlowDown"), every=19, times=0)
        lost = Rule(name="reset", fault=Reset(after=True), every=97, times=0)
        relay.rules = (slow, lost)
        environment = server.environment | {"AWS_ENDPOINT_URL": relay.endpoint}
        for _ in range(_MOST_RUNS):
            counts.runs += 1
            with Hosts(nodes=3, cpus=1) as hosts:
                ended = _run(spec, hosts, environment, pick, counts)
            finished.update(ended.finished)
            counts.tries_again += ended.started.total() - len(ended.started)
            if not ended.code:
                break
            failed = ended.lines(" failed: ")
            counts.failed_in_a_run += len(failed)
            said = failed or [ended.said[-1500:]]
            print(f"run {counts.runs} ended with {ended.code}", *said, sep="\n", file=sys.stderr)
        counts.requests_refused, counts.requests_reset = slow.hits, lost.hits


def _run(
    spec: Path, hosts: Hosts, environment: Mapping[str, str], pick: random.Random, counts: Counts
) -> Ended:
    driver = Driver(spec, ["--address", hosts.address], hosts.environment | environment)
    now = time.monotonic()
    worker_at, node_at, deadline = now + WORKER_SECONDS, now + NODE_SECONDS, now + _LONGEST_RUN_SECONDS
    while driver.process.poll() is None and now < deadline:
        time.sleep(0.2)
        now = time.monotonic()
        if now > worker_at:
            counts.workers_killed += hosts.kill_any_worker(pick)
            worker_at = now + WORKER_SECONDS * pick.uniform(0.5, 1.5)
        if now > node_at:
            hosts.replace_node(pick)
            counts.nodes_killed += 1
            node_at = time.monotonic() + NODE_SECONDS * pick.uniform(0.5, 1.5)
    return driver.ended()


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the clusters are ended
    counts = soak(arguments.models, arguments.seed)
    if arguments.json:
        print(json.dumps(asdict(counts), indent=2))
    else:
        for name, value in asdict(counts).items():
            print(f"{name.replace('_', ' '):18} {value}")
    disturbed = min(
        counts.workers_killed, counts.nodes_killed, counts.requests_refused, counts.requests_reset
    )
    bad = counts.lost or counts.doubled or counts.wrong or counts.done_twice
    return int(bool(bad) or not disturbed)


if __name__ == "__main__":
    sys.exit(main())
