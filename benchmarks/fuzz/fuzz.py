"""Coverage-guided fuzzing of all that is parsed, by the table in tests/fuzz (Linux, `pip install atheris==3.0.0`).

`python benchmarks/fuzz/fuzz.py [TARGET ...] --minutes 2` runs each target so long, in a process of its own, from the
kept corpus on. A case that breaks a promise is written to `tests/fuzz/corpus/<target>/found-<sha256>`: `make test`
replays it until it is mended. Prints executions, minutes and new cases per target; leaves 1 if there are any.
"""

import argparse
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FUZZ = Path(__file__).resolve().parents[2] / "tests" / "fuzz"
CORPUS = FUZZ / "corpus"
LONGEST_BYTES = 64 << 10
MEMORY_MEGABYTES = 3000
SECONDS_PER_CASE = 15
SECONDS_PER_SEED = 0.2  # of processor time: bombs, of which every change is another one, would take all of it
PROCESS_SECONDS = 300  # to start, read the seeds and end, beside the fuzzing itself, on a busy machine
STATED = re.compile(rb"Done (\d+) in (\d+) second|stat::number_of_executed_units: (\d+)")

sys.path.insert(0, str(FUZZ))


def fuzz(target: str, seconds: int, seeds: str) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["fleetpress", "zipfile", "numpy.lib"]):
        import fuzz_targets

    def one(data: bytes) -> None:
        found = fuzz_targets.verdict(target, data)
        if found.failure:
            keep(target, data)
            raise AssertionError(found.failure)

    for seed in Path(seeds).iterdir():
        started = time.process_time()
        one(seed.read_bytes())
        if time.process_time() - started > SECONDS_PER_SEED:
            seed.unlink()
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_BYTES}",
        f"-rss_limit_mb={MEMORY_MEGABYTES}",
        f"-timeout={SECONDS_PER_CASE}",
        f"-artifact_prefix={seeds}-crash-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, seeds], one)
    atheris.Fuzz()


def keep(target: str, data: bytes) -> None:
    name = f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    (CORPUS / target / name).write_bytes(data)


def write_seeds(target: str, folder: str) -> None:
    """The kept cases of a target and the small ones of those that code makes."""
    from fuzz_replay import bytes_of, kept

    for case in kept():
        data = bytes_of(case) if case.startswith(f"{target}/") else b""
        if 0 < len(data) <= LONGEST_BYTES:
            Path(folder, case.split("/")[1]).write_bytes(data)


def run(target: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; whether it kept every promise."""
    with tempfile.TemporaryDirectory(prefix="fleetpress-fuzz-") as scratch:
        seeds = os.path.join(scratch, "seeds")
        os.mkdir(seeds)
        write_seeds(target, seeds)
        command = [sys.executable, __file__, target, "--seconds", str(seconds), "--seeds", seeds]
        done = subprocess.run(
            command,
            capture_output=True,
            cwd=scratch,
            env=os.environ | {"TMPDIR": scratch},  # libFuzzer ends a process without its clearing up
            check=False,
            timeout=seconds + PROCESS_SECONDS,
        )
        for path in Path(scratch).glob(
            "seeds-crash-*"
        ):  # a deadline or a ceiling: libFuzzer ended it, not `one`
            keep(target, path.read_bytes())
    counts = [int(match[1] or match[3]) for match in STATED.finditer(done.stderr)]
    state = "ok" if done.returncode == 0 else f"FAILED: {_reason(done.stderr)}"
    print(f"{target:20} {max(counts, default=0):10,} executions {seconds / 60:5.1f} min  {state}", flush=True)
    return done.returncode == 0


def _reason(output: bytes) -> str:
    lines = output.decode(errors="replace").splitlines()
    told = [line for line in lines if "AssertionError" in line or "ERROR" in line or "escaped" in line]
    return " | ".join(told[-2:] or lines[-1:])[:300]


def main() -> None:
    """Fuzz the named targets, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", nargs="*", help="names of targets; all without")
    parser.add_argument("--minutes", type=float, default=2.0, help="for each target")
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seeds:
        logging.getLogger("fleetpress").setLevel(logging.ERROR)  # a refused record is a warning
        fuzz(args.target[0], args.seconds, args.seeds)
    from fuzz_targets import TARGETS

    if unknown := set(args.target) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    results = [run(target, round(args.minutes * 60)) for target in args.target or TARGETS]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
