"""Verbs of runs: begin one, see how it stands, end it, tell of it."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .job_places import find, output_and_run, stop, tell_job
from .options import SPEC_HELP, add_verb, executor_options, log_options, message, print_json


def add_verbs(verbs: Any) -> None:
    """demo, plan, run, status, cancel, report."""
    verb = add_verb(verbs, "demo", _demo, "train a small fleet, compress it, show the table")
    verb.add_argument("--s3", action="store_true", help="through a real S3 server on this machine")
    verb.add_argument("--folder", default="fleetpress-demo", help="where to put it (default: %(default)s)")
    executor_options(verb)
    log_options(verb)

    verb = add_verb(verbs, "plan", _plan, "what a spec would do, from headers only")
    verb.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    verb.add_argument("--allow-code", action="store_true", help="import the factories that the spec names")

    verb = add_verb(verbs, "run", _run, "compress the fleet of a spec; again is the resume")
    verb.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    verb.add_argument("--allow-code", action="store_true", help="import the factories that the spec names")
    executor_options(verb)
    verb.add_argument("--job", help=argparse.SUPPRESS)  # set by the driver of a submitted job
    verb.add_argument("--job-address", default="", help=argparse.SUPPRESS)
    log_options(verb)

    verb = add_verb(verbs, "status", _status, "models and states of a run, from the output alone")
    output_and_run(verb)
    verb.add_argument("--watch", action="store_true", help="follow it to its end, which gives the exit code")
    log_options(verb)

    verb = add_verb(verbs, "cancel", _cancel, "end a run that is under way; what is done is kept")
    output_and_run(verb, which="the one that is under way")

    verb = add_verb(verbs, "report", _report, "the table of a run, and its HTML page; of all runs with --all")
    output_and_run(verb)
    verb.add_argument(
        "--all", action="store_true", help="every run of the output in a line, bytes saved over time"
    )
    verb.add_argument("--html", metavar="FILE", help="write the page to this file")


def _demo(arguments: argparse.Namespace) -> int:
    from ..demo import run_demo

    return run_demo(
        folder=arguments.folder,
        through_s3=arguments.s3,
        executor=arguments.executor,
        address=arguments.address,
        as_json=arguments.json,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from ..preview.fleet import preview
    from ..spec.fleet_spec import load_spec
    from ..tables import print_preview

    found = preview(load_spec(arguments.spec), allow_code=arguments.allow_code)
    if arguments.json:
        print_json(found.as_dict())
    else:
        print_preview(found)
    return found.exit_code


def _run(arguments: argparse.Namespace) -> int:
    from ..driver.job_records import JobRecord
    from ..driver.run import run_fleet
    from ..runs.live import Live
    from ..spec.fleet_spec import load_spec
    from ..tables import print_result

    spec = load_spec(arguments.spec)
    with Live(title=spec.name) as live:
        result = run_fleet(
            spec,
            executor=arguments.executor,
            address=arguments.address,
            allow_code=arguments.allow_code,
            listener=live.update,
            job=JobRecord(job=arguments.job, address=arguments.job_address) if arguments.job else None,
        )
    if arguments.json:
        print_json(result.as_dict())
    else:
        print_result(result)
    if result.state == "interrupted":
        again = "submit the spec again" if arguments.job else f"fleetpress run {arguments.spec}"
        message(f"interrupted; what is done is kept. Resume with: {again}")
    return result.exit_code


def _status(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.artifact import exists

    from ..runs.heartbeat import alive_key
    from ..runs.results import read_result
    from ..tables import print_result

    place = find(arguments)
    if place.job is not None and place.run is None:
        return tell_job(place.job, as_json=arguments.json)
    store = place.store
    if arguments.watch:
        from ..runs.watching import Watcher

        try:
            result = Watcher(store, place.run).follow()
        except KeyboardInterrupt:
            message("watched no longer; the run goes on")
            return 130
    else:
        result = read_result(store, place.run)
    if arguments.json:
        print_json(result.as_dict())
    else:
        print_result(result)
    if result.state == "running" and (arguments.watch or not exists(store, alive_key(result.run))):
        message(
            f"run {result.run} shows no sign of life: it is just ending, or its driver is dead; "
            "if it stays so, run the spec again to go on"
        )
        return 130 if arguments.watch else 0
    return result.exit_code if arguments.watch else 0


_ENDS = {
    "over": "had ended before",
    "cancelled": "what is done is kept; `fleetpress run SPEC` goes on with it",
    "dead": "its driver is dead; what is done is kept; `fleetpress run SPEC` goes on with it",
    "asked": "its driver has been asked to end and is still busy; look again with `fleetpress status`",
}


def _cancel(arguments: argparse.Namespace) -> int:
    from ..driver.cancel import cancel

    place = find(arguments)
    if place.job is not None and place.run is None:
        return stop(arguments.address, place.job, as_json=arguments.json)
    ended = cancel(place.store, place.run)
    if place.job is not None and ended.outcome == "asked":
        return stop(arguments.address, place.job, as_json=arguments.json)
    if arguments.json:
        print_json(ended.as_dict())
    else:
        print(f"run {ended.run}: {ended.state}; {_ENDS[ended.outcome]}")
    return 4 if ended.outcome == "asked" else 0


def _report(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.uri import join

    from ..report import page_of
    from ..runs.results import (
        REPORT,
        RUNS,
        read_result,
    )
    from ..tables import print_result

    if arguments.all:
        return _all_runs(arguments)
    place = find(arguments)
    if place.job is not None and place.run is None:
        return tell_job(place.job, as_json=arguments.json)
    store = place.store
    result = read_result(store, place.run)
    if arguments.html:
        _write_page(arguments.html, page_of(store, result))
    if arguments.json:
        print_json(result.as_dict())
    else:
        print_result(result)
        if result.state == "running" and not arguments.html:
            message("the run goes on: its page comes at its end, or as it stands with --html FILE")
        else:
            message(f"report: {arguments.html or join(store.uri, RUNS + result.run, REPORT)}")
    return 0


def _all_runs(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.store import open_store

    from ..report import render_runs
    from ..runs.run_lines import run_lines
    from ..tables import print_runs

    if arguments.run:
        raise UsageError(f"--all tells of every run: leave {arguments.run!r} out, or leave --all out")
    runs, unread = run_lines(open_store(arguments.output))
    if arguments.html:
        _write_page(arguments.html, render_runs(arguments.output, runs, unread, page=arguments.html))
    if arguments.json:
        print_json({"output": arguments.output, "runs": [run.as_dict() for run in runs]})
    else:
        print_runs(runs)
        if arguments.html:
            message(f"report: {arguments.html}")
    for run in unread:
        message(f"run {run} is left out: its summary cannot be read")
    return 0


def _write_page(path: str, page: str) -> None:
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}; name another file") from None
