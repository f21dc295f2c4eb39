"""Which run of which output a command line means: named by its run, by its job, or by a job that a cluster knows."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..runs.figures import one_line
from .options import message, print_json

if TYPE_CHECKING:
    from fleetpress.storage.store import ObjectStore

    from ..executors.job_state import JobState

_OUR_JOB = re.compile(r"fleetpress-.+-[0-9a-f]{12}(-\d+)?")


@dataclass(frozen=True, kw_only=True)
class Place:
    """An output and a run in it (None: the verb's own choice); `job` is what the cluster says, if it was asked."""

    store: ObjectStore
    run: str | None
    job: JobState | None = None


def address_option(verb: argparse.ArgumentParser) -> None:
    """The job server of a cluster."""
    verb.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard, http://head:8265 (default: RAY_API_SERVER_ADDRESS)",
    )


def output_and_run(verb: argparse.ArgumentParser, which: str = "the latest") -> None:
    """Which run of which output, or which job of a cluster."""
    verb.add_argument(
        "output", metavar="OUTPUT", help="the `output` of a spec; with --address a job's id will do"
    )
    verb.add_argument(
        "run", metavar="RUN_OR_JOB", nargs="?", help=f"the id of a run or a job (default: {which})"
    )
    verb.add_argument("--address", metavar="URL", help="ask the cluster of the job, too: http://head:8265")


def address_of(arguments: argparse.Namespace, *, from_environment: bool = True) -> str | None:
    """The address that was given, or the one that Ray's own commands would take."""
    if arguments.address or not from_environment:
        return arguments.address or None
    ray_address = os.environ.get("RAY_ADDRESS", "")
    found = os.environ.get("RAY_API_SERVER_ADDRESS") or (
        ray_address if ray_address.startswith("http") else ""
    )
    return found or None


def find(arguments: argparse.Namespace) -> Place:
    """The output and the run that are meant. Raises UsageError for a job that is unknown or that has no run yet."""
    from fleetpress.storage.errors import StorageError
    from fleetpress.storage.store import open_store

    from ..driver.job_records import run_of

    if not arguments.address:
        if (
            arguments.run is None
            and _OUR_JOB.fullmatch(arguments.output)
            and not os.path.exists(arguments.output)
        ):
            raise UsageError(
                f"{arguments.output} is the id of a job; add the --address of its cluster, or put its OUTPUT before it"
            )
        store = open_store(arguments.output)
        return Place(store=store, run=run_of(store, arguments.run))
    state = ask(arguments)
    if state is None:  # the output may still tell of it
        store = open_store(arguments.output)
        return Place(store=store, run=run_of(store, arguments.run))
    output = state.metadata.get("output")
    if not output:
        raise UsageError(f"job {state.job} is none of fleetpress: it has no output")
    store = open_store(output)
    try:
        run = run_of(store, state.job)
    except StorageError as error:  # the cluster's word will have to do
        message(f"WARNING {error}")
        run = None
    return Place(store=store, run=None if run == state.job else run, job=state)


def ask(arguments: argparse.Namespace) -> JobState | None:
    """What the cluster at --address says of the job; None if it does not know one that the output may know."""
    from ..submission import job_state

    job = arguments.run or arguments.output
    state = job_state(arguments.address, job)
    if state is None and not arguments.run:
        raise unknown_job(arguments.address, job)
    return state


def unknown_job(address: str, job: str) -> UsageError:
    """What to say of a job that its cluster does not know."""
    from fleetpress.storage.uri import without_userinfo

    return UsageError(
        f"the cluster at {without_userinfo(address)} knows no job {job!r}; look with "
        "`fleetpress list --address URL`, or give the output: OUTPUT JOB"
    )


def tell_job(state: JobState, *, as_json: bool) -> int:
    """What a cluster says of a job; there is no run to tell of."""
    if as_json:
        print_json(state.as_dict())
    else:
        print(_line(state))
    return 0


def stop(address: str, state: JobState, *, as_json: bool) -> int:
    """End a job through its cluster: one that has no run yet, or whose run cannot be reached."""
    from ..submission import job_state, stop_job

    if not state.is_over:
        stop_job(address, state.job)
        state = job_state(address, state.job) or state
    if as_json:
        print_json(state.as_dict())
    else:
        print(f"{_line(state)}; " + ("had ended before" if state.is_over else "has been told to end"))
    return 0


def list_jobs(arguments: argparse.Namespace) -> int:
    """Jobs that a cluster knows, those of one output only if it is given; or those that an output has kept."""
    from fleetpress.storage.store import open_store

    from ..driver.job_records import jobs_in
    from ..submission import job_states
    from ..tables import print_jobs

    output = arguments.output
    if arguments.address:
        states = job_states(arguments.address)
        found = [state.as_dict() for state in states if output in (None, state.metadata.get("output"))]
    elif output is None:
        raise UsageError("--jobs lists those of an OUTPUT; give one, or --address URL")
    else:
        found = [record.as_dict() for record in jobs_in(open_store(output))]
    if arguments.json:
        print_json(found)
    else:
        print_jobs(found)
    return 0


def _line(state: JobState) -> str:
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    return one_line(f"job {state.job}: {state.state}{code}" + (f" ({state.reason})" if state.reason else ""))
