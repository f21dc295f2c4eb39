"""Verbs of jobs: give a fleet to a cluster, and read what it prints there."""

import argparse
import sys
from typing import Any

from ..errors import UsageError
from ..runs.figures import one_line
from .job_places import address_of, address_option, find, output_and_run, unknown_job
from .options import SPEC_HELP, add_verb, message, print_json


def add_verbs(verbs: Any) -> None:
    """submit, logs."""
    verb = add_verb(
        verbs, "submit", _submit, "run a spec as a job of a Ray cluster; again joins the job that runs"
    )
    verb.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    address_option(verb)
    verb.add_argument(
        "--no-wait", action="store_true", help="print the job's id and leave, do not follow its log"
    )
    verb.add_argument(
        "--submission-id",
        metavar="ID",
        help="the job's id: one job for ever, never started again (default: made of the spec, numbered)",
    )
    verb.add_argument("--allow-code", action="store_true", help="run the factories that the spec names")
    verb.add_argument(
        "--code",
        metavar="PLACE",
        action="append",
        default=[],
        help="a Python file or folder with the factories, sent along; may be given again",
    )

    verb = add_verb(
        verbs, "logs", _logs, "what a job prints on its cluster, or what the output keeps of a run"
    )
    output_and_run(verb)
    verb.add_argument("-f", "--follow", action="store_true", help="until it ends; leaves with its exit code")


def _submit(arguments: argparse.Namespace) -> int:
    from ..submission import submit_spec

    address = address_of(arguments)
    if address is None:
        raise UsageError("no cluster is named; give --address http://head:8265, or RAY_API_SERVER_ADDRESS")
    submitted = submit_spec(
        arguments.spec,
        address=address,
        submission_id=arguments.submission_id,
        allow_code=arguments.allow_code,
        code=arguments.code,
    )
    for warning in submitted.warnings:
        message(f"WARNING {warning}")
    job = submitted.job
    over = submitted.exit_code is not None
    found = f"had ended before: {submitted.state}" if over else "joined, it was there already"
    message(f"job {job}: {'started' if submitted.is_new else found}")
    if arguments.no_wait or (over and not submitted.is_new):
        if arguments.json:
            print_json(submitted.as_dict())
        else:
            print(job)
        return 0 if arguments.no_wait else int(submitted.exit_code or 0)
    return _follow(address, job, as_json=arguments.json, told=submitted.as_dict())


def _follow(address: str, job: str, *, as_json: bool, told: dict[str, Any]) -> int:
    """The job's log until it ends, on stdout; with `as_json` on stderr, and what became of it on stdout."""
    from fleetpress.storage.uri import without_userinfo

    from ..executors.ray_jobs import JobServer

    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        state = JobServer(address).follow(job, write)
    except KeyboardInterrupt:
        there = f"{job} --address {without_userinfo(address)}"
        message(
            f"\njob {job} goes on. Follow it: fleetpress logs -f {there}\nEnd it: fleetpress cancel {there}"
        )
        return 130
    if as_json:
        print_json({**told, **state.as_dict()})
    if state.reason and state.driver_exit_code is None:
        message(one_line(f"fleetpress: job {job} {state.state}: {state.reason}"))
    return int(state.exit_code or 0)


def _logs(arguments: argparse.Namespace) -> int:
    address = address_of(arguments, from_environment=False)
    if address is None:
        return _kept_logs(arguments)
    from ..executors.ray_jobs import JobServer

    job = arguments.run or arguments.output
    server = JobServer(address)
    state = server.state(job)
    if state is None:
        if arguments.run:  # the output may still tell of it
            return _kept_logs(arguments)
        raise unknown_job(address, job)
    if arguments.follow:
        return _follow(address, job, as_json=arguments.json, told={})
    log = server.log(job)
    if arguments.json:
        print_json({**state.as_dict(), "log": log})
    else:
        sys.stdout.write(log)
    return 0


def _kept_logs(arguments: argparse.Namespace) -> int:
    """From the output alone."""
    from ..runs.run_log import (
        follow_run,
        kept_log,
        line_of,
    )

    place = find(arguments)
    if arguments.follow:
        result = follow_run(place.store, place.run, lambda line: print(line, flush=True))
        if result.state == "running":
            message(
                f"run {result.run} shows no sign of life; if it stays so, run or submit the spec again to go on"
            )
            return 130
        return result.exit_code
    events = kept_log(place.store, place.run)
    if arguments.json:
        print_json(events)
    else:
        print(*map(line_of, events), sep="\n")
    return 0
