"""`<output>/jobs/<job>.json`: which run a job became, so that its id leads there when the cluster is long gone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fleetpress.storage import canonical_json
from fleetpress.storage.errors import ArtifactCorrupt, ObjectNotFound
from fleetpress.storage.store import ObjectStore, read_json

from ..errors import UsageError
from ..executors.job_state import valid_job
from ..threads import side_by_side

JOBS = "jobs/"
_RUN = re.compile(r"\d{8}T\d{6,9}Z-[0-9a-f]{6}")
_SUFFIX = ".json"


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job, its run (None: it ended before it began one), the cluster's job server, and how the driver left."""

    job: str
    address: str
    run: str | None = None
    exit_code: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def write_job(store: ObjectStore, record: JobRecord) -> None:
    """Write or replace the record."""
    store.put(_key(record.job), canonical_json.dumps(record.as_dict()))


def read_job(store: ObjectStore, job: str) -> JobRecord:
    """The record of a job. Raises ObjectNotFound, ArtifactCorrupt."""
    key = _key(job)
    try:
        told = read_json(store, key)
        record = JobRecord(**told)
        fits = isinstance(record.run, str | None) and isinstance(record.exit_code, int | None)
        if not fits or not isinstance(record.address, str) or record.job != job:
            raise ValueError("a field is of the wrong type")
    except (ValueError, TypeError) as error:
        raise ArtifactCorrupt(f"{store.uri}/{key} is no record of a job ({error}); delete it") from None
    return record


def jobs_in(store: ObjectStore) -> list[JobRecord]:
    """Every job that worked on an output, in the order of their runs."""
    names = [
        key.removeprefix(JOBS).removesuffix(_SUFFIX) for key in store.sizes(JOBS) if key.endswith(_SUFFIX)
    ]
    found = side_by_side(lambda job: read_job(store, job), names)
    return sorted(found, key=lambda record: (record.run or "", record.job))


def run_of(store: ObjectStore, name: str | None) -> str | None:
    """The run that a run's id or a job's id means; None without one. Raises ObjectNotFound for a job without a run."""
    if name is None or _RUN.fullmatch(name):
        return name
    try:
        record = read_job(store, valid_job(name))
    except (ObjectNotFound, UsageError):
        return name  # who looks for the run tells what there is
    if record.run is None:
        raise ObjectNotFound(
            f"job {name} ended with exit code {record.exit_code} before it began a run; its log is on the cluster"
        )
    return record.run


def _key(job: str) -> str:
    return f"{JOBS}{job}{_SUFFIX}"
