"""Replays kept and made cases in a process of its own, each under a ceiling of memory and a deadline of its own.

`python fuzz_replay.py MEGABYTES SECONDS CASE...`: a line of JSON for each case before it begins and one after it,
so that a process that dies tells where.
"""

import faulthandler
import json
import logging
import resource
import signal
import sys
import time
from pathlib import Path

from fuzz_bombs import BOMBS
from fuzz_coded import CODED
from fuzz_makers import MADE
from fuzz_targets import verdict

CORPUS = Path(__file__).parent / "corpus"
MAKERS = MADE | CODED | BOMBS
_WAITED = 20  # times the deadline, for what waits and does not work


def kept() -> list[str]:
    """Every case as `target/name`: the files of the corpus, and those that code makes."""
    files = [path.relative_to(CORPUS).as_posix() for path in sorted(CORPUS.glob("*/*"))]
    return [*files, *MAKERS]


def bytes_of(case: str) -> bytes:
    return MAKERS[case]() if case in MAKERS else (CORPUS / case).read_bytes()


def warm_up() -> None:
    """Imports that a limit of memory should not be charged with."""
    import pyarrow.parquet
    import torch.export

    assert torch.export
    assert pyarrow.parquet


def limit(megabytes: int) -> None:
    """So many more megabytes of data than there are now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + (megabytes << 20),) * 2)


def main() -> None:
    """Replay the cases of the command line, or all."""
    megabytes, seconds, *cases = sys.argv[1:]
    faulthandler.enable()
    logging.getLogger("fleetpress").setLevel(logging.ERROR)  # a refused record is a warning
    warm_up()
    made = {case: bytes_of(case) for case in cases or kept()}
    limit(int(megabytes))
    for case, data in made.items():
        print(json.dumps({"case": case}), flush=True)
        # Of processor time, whatever else the machine does; the default action ends the process: no C code swallows it.
        signal.setitimer(signal.ITIMER_PROF, float(seconds))
        signal.alarm(_WAITED * int(seconds))
        started = time.process_time()
        found = verdict(case.split("/")[0], data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        told = {
            "case": case,
            "refused": found.refused,
            "failure": found.failure,
            "message": found.message[:300],
            "seconds": round(time.process_time() - started, 2),
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
