"""The driver of a submitted job: `run` on the head of the cluster, with the spec that came along.

python -m fleetpress.jobs.submitted JOB --address URL [--allow-code]
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from fleetpress.storage.errors import ObjectNotFound, StorageError

_NEEDED = ("ray", "torch", "numpy", "boto3", "safetensors", "pydantic", "yaml", "rich", "jinja2")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code as that of `fleetpress run`; 5 where the node lacks what fleetpress needs."""
    options = argparse.ArgumentParser(prog="fleetpress.jobs.submitted", description=__doc__)
    options.add_argument("job")
    options.add_argument("--address", required=True)
    options.add_argument("--allow-code", action="store_true")
    arguments = options.parse_args(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"fleetpress: this cluster's Python ({sys.executable}) has no {', '.join(missing)}; install fleetpress' "
            "dependencies on every node: its image, or setup_commands of cluster.yaml",
            file=sys.stderr,
        )
        return 5
    from .cli import main as run_verb
    from .shipment import SPEC_IN_JOB

    spec = os.path.abspath(SPEC_IN_JOB)  # Ray may change the folder
    allowed = ["--allow-code"] if arguments.allow_code else []
    code = run_verb(
        ["run", SPEC_IN_JOB, *allowed, "--job", arguments.job, "--job-address", arguments.address]
    )
    _write_end(spec, arguments.job, arguments.address, code)
    return code


def _write_end(spec_path: str, job: str, address: str, code: int) -> None:
    """Note the exit code beside the run; an output that cannot be written has been told of already."""
    from fleetpress.storage.store import open_store

    from .driver.job_records import (
        JobRecord,
        read_job,
        write_job,
    )
    from .errors import FleetpressError
    from .spec.fleet_spec import load_spec

    with suppress(StorageError, FleetpressError):
        store = open_store(load_spec(spec_path).output)
        try:
            run = read_job(store, job).run
        except ObjectNotFound:
            run = None
        write_job(store, JobRecord(job=job, address=address, run=run, exit_code=code))


if __name__ == "__main__":
    sys.exit(main())
