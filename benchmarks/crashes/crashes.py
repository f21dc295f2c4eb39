"""Crash a run at every one of its storage operations, run it again, and compare with a run that nothing disturbed.

    python benchmarks/crashes/crashes.py                        # all kinds, modes and operations: some minutes
    python benchmarks/crashes/crashes.py --kinds shards --modes gone --every 5 --stores s3

Prints a table; exits with 1 if anything was lost or done twice.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from crash_fleets import CALIBRATED, KINDS, write_code, write_sources
from crash_forks import Runs
from crash_store import MODES
from crash_trials import Course, Quiet, Trial, clear, left_over, lost, reason_of

from fleetpress.storage.s3_client import shared_client
from fleetpress.storage.store import open_store

STORES = ("folder", "s3")
ALL = {**KINDS, CALIBRATED.name: CALIBRATED}
TWO_RUNS = ("two runs", "two runs, blind")
SMALLEST_PART_BYTES = 256  # that the S3 server takes; Amazon's takes 5 MiB
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "moto",
    "AWS_SECRET_ACCESS_KEY": "moto-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """All trials of one kind of model, store and mode."""

    kind: str
    store: str
    mode: str
    operations: int
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def tried(self) -> list[Trial]:
        """Those whose fault struck: two threads need not take the same number of operations each time."""
        return [trial for trial in self.trials if trial.operation]

    @property
    def bad(self) -> list[Trial]:
        """Those in which anything was lost or done twice."""
        return [trial for trial in self.trials if trial.lost or trial.doubled]

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        went_on = sum(trial.codes[0] == 0 for trial in self.tried)
        return (
            self.kind,
            self.store,
            self.mode,
            f"{len(self.tried)} of {self.operations}",
            str(len(self.tried) - sum(bool(trial.lost) for trial in self.tried)),
            str(went_on),
            str(sum(bool(trial.lost) for trial in self.trials)),
            str(sum(len(trial.doubled) for trial in self.trials)),
            str(max((len(trial.left) for trial in self.trials), default=0)),
            f"{self.seconds:.0f}",
        )


COLUMNS = ("kind", "store", "mode", "tried", "survived", "same run", "lost", "doubled", "left", "seconds")


def crash(course: Course, quiet: Quiet, store: str, mode: str, ats: Sequence[int]) -> Row:
    """One trial for every operation in `ats`."""
    started = time.monotonic()
    trials = tuple(course.trial(quiet, mode, at) for at in ats)
    return Row(
        kind=course.kind.name,
        store=store,
        mode=mode,
        operations=quiet.operations,
        trials=trials,
        seconds=time.monotonic() - started,
    )


def race(course: Course, quiet: Quiet, outputs: str, store: str, mode: str, *, seeds: Sequence[int]) -> Row:
    """Two runs of one spec at once, mixed in another way for every seed; `blind`: writes ignore conditions."""
    started = time.monotonic()
    trials = []
    for seed in seeds:
        output = f"{outputs}/{course.kind.name}-{mode.replace(', ', '-').replace(' ', '-')}-{seed}"
        begun = time.monotonic()
        outcomes = course.run(output, times=2, pauses=seed, blind=mode.endswith("blind"))
        made = open_store(output)
        left = left_over(made, quiet)
        starts = Counter(note["task"] for outcome in outcomes for note in outcome.noted("start"))
        trials.append(
            Trial(
                mode=mode,
                at=seed,
                operation="all",
                codes=(outcomes[0].code, outcomes[1].code),
                lost=tuple(problem for outcome in outcomes for problem in lost(made, quiet, outcome)),
                # Without leases both may do everything.
                doubled=()
                if mode.endswith("blind")
                else tuple(task for task, count in starts.items() if count > 1),
                left=tuple(left),
                reason="; ".join(filter(None, map(reason_of, outcomes))),
                seconds=time.monotonic() - begun,
            )
        )
        clear(output, made)
    return Row(
        kind=course.kind.name,
        store=store,
        mode=mode,
        operations=len(seeds),
        trials=tuple(trials),
        seconds=time.monotonic() - started,
    )


@contextmanager
def s3_server() -> Iterator[str]:
    """A bucket on an S3 server in memory that takes small parts, and the AWS_* variables that lead to it."""
    from moto import backends
    from moto.s3 import models
    from moto.server import ThreadedMotoServer

    modules = tuple(backends.list_of_moto_modules())  # for every request it looks through its own folders
    with (
        answers_gone_uploads(),
        patch.object(backends, "list_of_moto_modules", lambda: iter(modules)),
        patch.object(models, "S3_UPLOAD_PART_MIN_SIZE", SMALLEST_PART_BYTES),
        patch.dict(os.environ, _CREDENTIALS),
    ):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
            shared_client().create_bucket(Bucket="crashes")
            yield "s3://crashes"
        finally:
            server.stop()


@contextmanager
def answers_gone_uploads() -> Iterator[None]:
    """To a part of an upload that is gone moto says what other servers do, instead of an error 500."""
    from moto.s3 import exceptions, models

    upload_part = models.S3Backend.upload_part

    def checked(self: Any, bucket_name: str, multipart_id: str, part_id: int, value: bytes) -> Any:
        if multipart_id not in self.get_bucket(bucket_name).multiparts:
            raise exceptions.NoSuchUpload(upload_id=multipart_id)
        return upload_part(self, bucket_name, multipart_id, part_id, value)

    with patch.object(models.S3Backend, "upload_part", checked):
        yield


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    cells = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """All that is asked for; 1 if anything was lost or done twice."""
    options = _options().parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fleetpress-crashes-") as folder, s3_server() as bucket:
        write_code(Path(folder))
        places = {"folder": folder, "s3": bucket}
        for store in options.stores:
            write_sources(f"{places[store]}/source")
        tasks = [(kind, store) for kind in options.kinds for store in options.stores]
        with ThreadPoolExecutor(options.workers) as pool:
            for found in pool.map(lambda task: _rows(*task, places[task[1]], Path(folder), options), tasks):
                rows += found
    print(table(rows))
    bad = [(row, trial) for row in rows for trial in row.bad]
    for row, trial in bad:
        what = "; ".join((*trial.lost, *(f"{task} was done again" for task in trial.doubled)))
        print(f"{row.kind} {row.store} {row.mode} at {trial.at} ({trial.operation}): {what}")
    tried = sum(len(row.tried) for row in rows)
    print(
        f"\n{tried} faults tried, {tried - sum(bool(t.lost) for _, t in bad)} survived, "
        f"{sum(bool(t.lost) for _, t in bad)} lost, {sum(len(t.doubled) for _, t in bad)} done twice"
    )
    return 1 if bad else 0


def _rows(kind: str, store: str, place: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    own = folder / f"{kind}-{store}"
    own.mkdir()
    write_code(own)
    outputs = f"{place}/outputs"
    rows = []
    with Runs(transformers=kind == CALIBRATED.name) as runs:
        course = Course(
            runs, ALL[kind], source=f"{place}/source", outputs=outputs, folder=own, environment=_aws()
        )
        quiet = course.quiet()
        for mode in options.modes:
            if mode in TWO_RUNS:
                rows.append(race(course, quiet, outputs, store, mode, seeds=range(options.seeds)))
            else:
                ats = range(1, quiet.operations + 1, options.every)
                rows.append(crash(course, quiet, store, mode, ats))
            print("\r" + " | ".join(rows[-1].cells()), file=sys.stderr, flush=True)  # the whole takes an hour
    return rows


def _aws() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=ALL, default=list(ALL), metavar="KIND")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES), metavar="STORE")
    parser.add_argument(
        "--modes", nargs="+", choices=(*MODES, *TWO_RUNS), default=[*MODES, *TWO_RUNS], metavar="MODE"
    )
    parser.add_argument("--every", type=int, default=1, help="take every n-th operation (default: all)")
    parser.add_argument("--seeds", type=int, default=20, help="pairs of runs at once (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="trials side by side (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
