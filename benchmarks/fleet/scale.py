"""What a fleet costs its driver: time, memory and requests per model, for 100, 1,000 and 10,000 models.

    python benchmarks/fleet/scale.py [--sizes 100 1000 10000]

Everything is the product's own (resolve, plan, scheduler, leases, ledger, inline executor, command line), except that
steps compute nothing (noop_fleet.py) and the store is in memory (memory_store.py). Every size has a process of its own.
What a driver keeps is its peak resident memory above that of a process that has only imported everything, without the
store's index.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_store import Bucket
from noop_fleet import OUTPUT, in_memory, make_fleet

from fleetpress.jobs.cli import main as fleetpress
from fleetpress.jobs.driver.run import run_fleet
from fleetpress.jobs.runs.results import FleetResult

KINDS = ("LIST", "GET", "HEAD", "PUT", "conditional PUT", "DELETE")
GOAL_SECONDS = 2.0  # of status and report


def measured(bucket: Bucket, work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds and requests of a piece of work."""
    bucket.requests.clear()
    gc.collect()
    gc.freeze()  # what earlier phases left is looked through no more: a verb has a process of its own
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    requests: Counter[str] = Counter()
    for (_, kind, _), count in bucket.requests.items():
        requests[kind] += count
    return {"wall": wall, "cpu": cpu, "requests": requests}


def run(spec: Any, state: str) -> FleetResult:
    """One run, in which every model ends in this state."""
    result = run_fleet(spec, executor="inline")
    others = [model for model in result.models if model.state != state]
    if others:
        raise SystemExit(f"{len(others)} models are not {state}: {others[0]}")
    return result


def verb(*arguments: str) -> None:
    """A verb of the command line, with what it prints thrown away."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = fleetpress(arguments)
    if code:
        raise SystemExit(f"fleetpress {' '.join(arguments)} ended with {code}")


def resident_bytes() -> int:
    """Peak of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int, *, explicit: bool) -> dict[str, Any]:
    """All phases of a fleet of this size."""
    with in_memory() as bucket, tempfile.TemporaryDirectory() as folder:
        run(make_fleet(bucket, 1, explicit=explicit), "published")  # imports and caches
        for key, _ in bucket.below(""):
            bucket.remove(key)
        started = time.perf_counter()
        spec = make_fleet(bucket, size, explicit=explicit)
        spec_seconds = time.perf_counter() - started
        before, index = resident_bytes(), bucket.index_bytes
        phases = {"first run": measured(bucket, lambda: run(spec, "published"))}
        kept = resident_bytes() - before - (bucket.index_bytes - index)
        phases["unchanged run"] = measured(bucket, lambda: run(spec, "unchanged"))
        phases["status"] = measured(bucket, lambda: verb("status", OUTPUT))
        page = Path(folder) / "page.html"
        phases["report --html"] = measured(bucket, lambda: verb("report", OUTPUT, "--html", str(page)))
        summary = max(place.size for key, place in bucket.below("memory/output/runs/") if "summary" in key)
        return {
            "size": size,
            "how": "each named" if explicit else "one pattern",
            "spec_seconds": spec_seconds,
            "kept_bytes": kept,
            "page_bytes": page.stat().st_size,
            "summary_bytes": summary,
            "phases": phases,
        }


def in_own_process(size: int, *, explicit: bool) -> dict[str, Any]:
    """`measure`, where nothing of another size is left in memory."""
    command = [sys.executable, __file__, "--measure", str(size), *(["--explicit"] if explicit else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(done.stderr or f"a fleet of {size} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_fleet(found: dict[str, Any], smallest: dict[str, Any]) -> None:
    """One fleet; a ratio compares CPU time per model with that of the smallest fleet: above 1 is worse than linear."""
    size = found["size"]
    print(f"\n{size:,} models, {found['how']}: spec read in {found['spec_seconds']:.2f} s, ", end="")
    print(
        f"driver keeps {found['kept_bytes'] / size / 1000:.1f} kB a model ({found['kept_bytes'] / 1e6:.0f} MB)"
    )
    for name, phase in found["phases"].items():
        requests, per = phase["requests"], size if name.endswith("run") else 1
        told = ", ".join(f"{kind} {requests[kind] / per:.4g}" for kind in KINDS if kind in requests)
        cost = ""
        if name.endswith("run"):
            wall, cpu = (1000 * phase[clock] / size for clock in ("wall", "cpu"))
            ratio = cpu / (1000 * smallest["phases"][name]["cpu"] / smallest["size"])
            cost = f", a model {wall:.2f} ms, {cpu:.2f} ms of CPU (x{ratio:.2f}), requests"
        else:
            verdict = "within" if phase["wall"] < GOAL_SECONDS else "MISSES"
            cost = f", {phase['cpu']:.2f} s of CPU, {verdict} the goal of {GOAL_SECONDS} s"
        print(f"  {name}: {phase['wall']:.2f} s{cost}: {told}")
    print(f"  page {found['page_bytes'] / 1e6:.2f} MB, summary {found['summary_bytes'] / 1e6:.2f} MB")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--explicit", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, explicit=arguments.explicit)))
        return
    for explicit in (True, False):
        smallest: dict[str, Any] = {}
        for size in sorted(arguments.sizes):
            found = in_own_process(size, explicit=explicit)
            smallest = smallest or found
            print_fleet(found, smallest)


if __name__ == "__main__":
    main()
