"""The fault matrix: a fleet goes from and to a real S3 server through a relay that breaks requests, a fault a run.

    python benchmarks/faults/faults.py [--only PATTERN] [--json]

A fault that ends the run is taken away, and `fleetpress run` is given again. However it went, the artifacts must then
be those of a quiet run, byte for byte. The columns: how often the fault struck; whether the same run survived it;
models that are missing in the end (lost), artifacts beyond one per model (doubled), files that are not those of the
quiet run (wrong); multipart uploads left over, which `gc` removes. Exit code 1 if anything was lost, doubled or wrong,
a fault did not strike, or a run ended without saying why.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fault_cases import Case, cases
from fault_fleet import MODELS, Published, files, published, write_spec
from fault_relay import FaultRelay
from forked_runs import Outcome, Runner

from fleetpress.jobs.seaweed import SeaweedFS, start_seaweedfs
from fleetpress.storage.s3_client import shared_client
from fleetpress.storage.store import open_store

_NO_CLOUD = {"AWS_EC2_METADATA_DISABLED": "true"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a fault did."""

    fault: str
    hits: int
    survived: str
    lost: int
    doubled: int
    wrong: tuple[str, ...]
    uploads: int
    seconds: float
    reason: str
    problem: str

    @property
    def ok(self) -> bool:
        """Whether nothing of it is a defect."""
        return not self.problem


class Matrix:
    """A server with the fleet's files, a relay before it, and what a quiet run publishes."""

    def __init__(
        self, server: SeaweedFS, bucket: str, relay: FaultRelay, runner: Runner, folder: Path
    ) -> None:
        self._server, self._bucket, self._relay, self._runner = server, bucket, relay, runner
        self._folder = folder
        self._place = f"{bucket}/{secrets.token_hex(4)}"
        self._source = f"{self._place}/in"
        store = open_store(self._source)
        for key, data in files().items():
            store.put(key, data)
        output = f"{self._place}/out-quiet"
        done = self._run(output)
        self.quiet = published(output)
        if done.code or self.quiet.problems or sorted(self.quiet.artifacts) != sorted(MODELS):
            raise RuntimeError(f"the quiet run went wrong: {done.reason} {self.quiet.problems}")

    def row(self, case: Case) -> Row:
        """One fault, and the resume without it if the run did not end well."""
        output = f"{self._place}/out-{secrets.token_hex(4)}"
        started = time.monotonic()
        self._relay.rules = case.rules
        try:
            first = last = self._run(output)
        finally:
            self._relay.rules = ()
        if first.code:
            last = self._run(output)
        found = published(output)
        return Row(
            fault=case.name,
            hits=min(rule.hits for rule in case.rules),
            survived="no" if last.code else "after resume" if first.code else "same run",
            lost=found.lost(self.quiet),
            doubled=found.doubled(),
            wrong=tuple(found.wrong(self.quiet)),
            uploads=len(_uploads(output)),
            seconds=round(time.monotonic() - started, 1),
            reason=first.reason if first.code else "",
            problem="; ".join(_problems(case, first, last, found, self.quiet)),
        )

    def _run(self, output: str) -> Outcome:
        spec = write_spec(self._folder / "spec.yaml", self._source, output)
        environment = self._server.environment | {"AWS_ENDPOINT_URL": self._relay.endpoint}
        return self._runner.run(["run", spec, "--executor", "inline", "--json"], environment)


def _problems(case: Case, first: Outcome, last: Outcome, found: Published, quiet: Published) -> Iterator[str]:
    yield from (f"{rule.name!r} did not strike" for rule in case.rules if not rule.hits)
    if found.lost(quiet) or found.doubled() or found.wrong(quiet):
        yield "lost, doubled or wrong results"
    if last.code:
        yield f"not mended by running again: exit code {last.code}, {last.reason}"
    if first.code and not case.resumes:
        yield f"the same run should have survived it: exit code {first.code}, {first.reason}"
    for outcome in (first, last):
        if outcome.code in (1, -9) or "Traceback" in outcome.err or "internal error" in outcome.reason:
            yield f"a bug came to light: {outcome.err.strip()[-2000:]}"
        if outcome.code and not outcome.reason:
            yield "a run ended without saying why"


def _uploads(output: str) -> list[str]:
    """Ids of multipart uploads that were left behind below an output."""
    bucket, _, prefix = output.removeprefix("s3://").partition("/")
    listed = shared_client().list_multipart_uploads(Bucket=bucket)
    return [upload["UploadId"] for upload in listed.get("Uploads", []) if upload["Key"].startswith(prefix)]


@contextlib.contextmanager
def matrix(server: SeaweedFS, bucket: str, runner: Runner, folder: Path) -> Iterator[Matrix]:
    """Everything that rows need; the AWS_* variables of this process lead to the server itself."""
    with FaultRelay(server.endpoint) as relay:
        yield Matrix(server, bucket, relay, runner, folder)


_COLUMNS = ("fault", "hits", "survived", "lost", "doubled", "wrong", "uploads", "seconds")


def _cells(row: Row) -> list[str]:
    shown = asdict(row) | {"wrong": len(row.wrong)}
    return [str(shown[name]) for name in _COLUMNS]


def table(rows: Sequence[Row]) -> str:
    """All rows, and a line of sums."""
    lines = [list(_COLUMNS), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join((*(line.rstrip() for line in text), "", summary(rows)))


def summary(rows: Sequence[Row]) -> str:
    """One sentence."""
    in_run = sum(row.survived == "same run" for row in rows)
    resumed = sum(row.survived == "after resume" for row in rows)
    return (
        f"{len(rows)} faults: {in_run} survived in the same run, {resumed} by running again; "
        f"{sum(row.lost for row in rows)} lost, {sum(row.doubled for row in rows)} doubled, "
        f"{sum(len(row.wrong) for row in rows)} wrong"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 0 if all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="faults whose name matches")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if re.search(options.only, case.name)]
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="fleetpress-faults-") as folder,
        start_seaweedfs(Path(folder, "server")) as server,
        Runner() as runner,
    ):
        os.environ.update(server.environment | _NO_CLOUD)
        with matrix(server, server.create_bucket("faults"), runner, Path(folder)) as found:
            for case in chosen:
                rows.append(found.row(case))
                _tell(rows[-1])
    if options.json:
        print(json.dumps([asdict(row) | {"ok": row.ok} for row in rows], indent=2))
    else:
        print(table(rows))
    return 0 if rows and all(row.ok for row in rows) else 1


def _tell(row: Row) -> None:
    """Progress, reasons and defects, on stderr."""
    print(f"{row.fault}: {row.survived}, {row.seconds} s", file=sys.stderr)
    for what, text in (("said", row.reason), ("DEFECT", row.problem), ("WRONG", ", ".join(row.wrong))):
        if text:
            print(f"    {what}: {text}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
