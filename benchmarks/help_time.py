"""How long `fleetpress --help` takes to answer, beside a Python that does nothing: `python benchmarks/help_time.py`."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
FLEETPRESS = Path(sys.executable).with_name("fleetpress")


def seconds(*command: str) -> float:
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def main() -> None:
    helped, bare = [], []
    for _ in range(RUNS):  # in turns, so that a load on the machine falls on both
        helped.append(seconds(str(FLEETPRESS), "--help"))
        bare.append(seconds(sys.executable, "-c", "pass"))
    help_seconds, bare_seconds = statistics.median(helped), statistics.median(bare)
    print(f"fleetpress --help   {help_seconds:.3f} s   (median of {RUNS})")
    print(f"python -c pass      {bare_seconds:.3f} s")
    print(f"ratio               {help_seconds / bare_seconds:.1f}")


if __name__ == "__main__":
    main()
