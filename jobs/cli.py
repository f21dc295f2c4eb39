"""The command line: `fleetpress VERB`. Data on stdout, messages on stderr, the documented exit codes.

Heavy imports (torch, ray, boto3) stay inside the verbs that need them: `--help` and `status` load none of them.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fleetpress.storage.errors import UNUSABLE_STORE, StorageError

from .errors import FleetpressError, UsageError

EXIT_CODES = """exit codes: 0 all published or unchanged; 2 wrong usage or spec; 3 some models rejected or failed;
4 none succeeded; 5 storage or cluster unreachable; 1 our own bug; 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is the answer. User errors become one message on stderr, never a traceback."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        return int(arguments.verb(arguments))
    except FleetpressError as error:
        return _complain(error, error.exit_code)
    except UNUSABLE_STORE as error:
        return _complain(error, 5)
    except StorageError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has left (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """Every verb with its options; the README's table is made from it."""
    top = argparse.ArgumentParser(
        prog="fleetpress",
        description="Compress fleets of models: prune, quantize, validate and publish, on Ray, from and to S3.",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"fleetpress {version('fleetpress')}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = _verb(verbs, "demo", _demo, "train a small fleet, compress it, show the table")
    verb.add_argument("--s3", action="store_true", help="through a real S3 server on this machine")
    verb.add_argument("--folder", default="fleetpress-demo", help="where to put it (default: %(default)s)")
    _executor(verb)

    verb = _verb(verbs, "plan", _plan, "what a spec would do, from headers only")
    verb.add_argument("spec", metavar="SPEC")
    verb.add_argument("--allow-code", action="store_true", help="import the factories that the spec names")

    verb = _verb(verbs, "run", _run, "compress the fleet of a spec; again is the resume")
    verb.add_argument("spec", metavar="SPEC")
    verb.add_argument("--allow-code", action="store_true", help="import the factories that the spec names")
    _executor(verb)

    verb = _verb(verbs, "status", _status, "models and states of a run, from the output alone")
    _output_and_run(verb)

    verb = _verb(verbs, "cancel", _cancel, "end a run that is under way; what is done is kept")
    verb.add_argument("output", metavar="OUTPUT", help="the `output` of a spec")
    verb.add_argument("run", metavar="RUN", nargs="?", help="a run's id (default: the one that is under way)")

    verb = _verb(verbs, "list", _list, "published models of an output")
    verb.add_argument("output", metavar="OUTPUT")

    verb = _verb(verbs, "report", _report, "the table of a run, and its HTML page")
    _output_and_run(verb)
    verb.add_argument("--html", metavar="FILE", help="write the page to this file")

    verb = _verb(verbs, "verify", _verify, "prove an artifact again: files, hashes, a run of the model")
    verb.add_argument(
        "artifact", metavar="ARTIFACT", help="<output>/models/<name> or <output>/models/<name>/<digest>"
    )
    verb.add_argument(
        "--deep",
        action="store_true",
        help="decode every weight of a checkpoint and compare it with the source",
    )

    verb = _verb(verbs, "dequantize", _dequantize, "plain weights back from an artifact")
    verb.add_argument("artifact", metavar="ARTIFACT")
    verb.add_argument("destination", metavar="DEST", help="folder or s3:// prefix to write to")

    verb = _verb(verbs, "gc", _gc, "what is left over in an output; deletes it only when told")
    verb.add_argument("output", metavar="OUTPUT", help="the `output` of a spec")
    verb.add_argument(
        "--delete", action="store_true", help="delete what is listed; start no run at the same time"
    )
    verb.add_argument(
        "--superseded", action="store_true", help="also artifacts that a newer one of the model has replaced"
    )

    verb = _verb(verbs, "methods", _methods, "methods, schemes, losses, metrics; one of them in full")
    verb.add_argument("name", metavar="NAME", nargs="?")

    verb = _verb(verbs, "doctor", _doctor, "what works here: storage, conditional writes, Ray, versions")
    verb.add_argument("places", metavar="URI", nargs="*", help="outputs or sources to try")
    verb.add_argument("--address", help="Ray cluster to try (default: RAY_ADDRESS, if set)")
    return top


def _verb(verbs: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary, epilog=EXIT_CODES
    )
    verb.add_argument("--json", action="store_true", help="machine-readable output")
    verb.set_defaults(verb=function)
    return verb


def _executor(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--executor", choices=("ray", "inline"), default="ray", help="where tasks run (default: ray)"
    )
    verb.add_argument(
        "--address", help="Ray cluster, host:port (default: RAY_ADDRESS, else one on this machine)"
    )


def _output_and_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("output", metavar="OUTPUT", help="the `output` of a spec")
    verb.add_argument("run", metavar="RUN", nargs="?", help="a run's id (default: the latest)")


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(
        folder=arguments.folder,
        through_s3=arguments.s3,
        executor=arguments.executor,
        address=arguments.address,
        as_json=arguments.json,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from .preview import preview
    from .spec import load_spec
    from .tables import print_preview

    found = preview(load_spec(arguments.spec), allow_code=arguments.allow_code)
    if arguments.json:
        _print_json(found.as_dict())
    else:
        print_preview(found)
    return found.exit_code


def _run(arguments: argparse.Namespace) -> int:
    from .live import Live
    from .run import run_fleet
    from .spec import load_spec
    from .tables import print_result

    spec = load_spec(arguments.spec)
    with Live(title=spec.name) as live:
        result = run_fleet(
            spec,
            executor=arguments.executor,
            address=arguments.address,
            allow_code=arguments.allow_code,
            listener=live.update,
        )
    if arguments.json:
        _print_json(result.as_dict())
    else:
        print_result(result)
    if result.state == "interrupted":
        _message(f"interrupted; what is done is kept. Resume with: fleetpress run {arguments.spec}")
    return result.exit_code


def _status(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.artifact import exists
    from fleetpress.storage.store import open_store

    from .heartbeat import alive_key
    from .results import read_result
    from .tables import print_result

    store = open_store(arguments.output)
    result = read_result(store, arguments.run)
    if arguments.json:
        _print_json(result.as_dict())
    else:
        print_result(result)
    if result.state == "running" and not exists(store, alive_key(result.run)):
        _message(
            f"run {result.run} shows no sign of life: it is just ending, or its driver is dead; "
            "if it stays so, run the spec again to go on"
        )
    return 0


_ENDS = {
    "over": "had ended before",
    "cancelled": "what is done is kept; `fleetpress run SPEC` goes on with it",
    "dead": "its driver is dead; what is done is kept; `fleetpress run SPEC` goes on with it",
    "asked": "its driver has been asked to end and is still busy; look again with `fleetpress status`",
}


def _cancel(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.store import open_store

    from .cancel import cancel

    ended = cancel(open_store(arguments.output), arguments.run)
    if arguments.json:
        _print_json(ended.as_dict())
    else:
        print(f"run {ended.run}: {ended.state}; {_ENDS[ended.outcome]}")
    return 4 if ended.outcome == "asked" else 0


def _gc(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.store import open_store

    from .gc import delete_leftovers, find_leftovers
    from .tables import print_leftovers

    store = open_store(arguments.output)
    found = find_leftovers(store, superseded=arguments.superseded)
    if arguments.delete:
        found = delete_leftovers(store, found)
    if arguments.json:
        _print_json(found.as_dict())
    else:
        print_leftovers(found, deleted=arguments.delete)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from .artifacts import published
    from .tables import print_published

    found = published(arguments.output)
    if arguments.json:
        _print_json(found)
    else:
        print_published(found)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.store import open_store
    from fleetpress.storage.uri import join

    from .report import page_of
    from .results import REPORT, RUNS, read_result
    from .tables import print_result

    store = open_store(arguments.output)
    result = read_result(store, arguments.run)
    if arguments.html:
        page = page_of(store, result)
        try:
            Path(arguments.html).write_text(page, encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{arguments.html}: cannot be written: {error.strerror}; name another file"
            ) from None
    if arguments.json:
        _print_json(result.as_dict())
    else:
        print_result(result)
        if result.state == "running" and not arguments.html:
            _message("the run goes on: its page comes at its end, or as it stands with --html FILE")
        else:
            _message(f"report: {arguments.html or join(arguments.output, RUNS + result.run, REPORT)}")
    return 0


_PROVED = {
    False: "every file is what was published, and the model loads",
    True: "every file is what was published, and every weight what its source becomes",
}


def _verify(arguments: argparse.Namespace) -> int:
    from .artifacts import verify

    problems = verify(arguments.artifact, deep=arguments.deep)
    if arguments.json:
        _print_json({"artifact": arguments.artifact, "ok": not problems, "problems": problems})
    elif problems:
        print("\n".join(problems))
    else:
        print(f"{arguments.artifact}: {_PROVED[arguments.deep]}")
    return 3 if problems else 0


def _dequantize(arguments: argparse.Namespace) -> int:
    from .artifacts import dequantize

    files = dequantize(arguments.artifact, arguments.destination)
    if arguments.json:
        _print_json({"destination": arguments.destination, "files": files})
    else:
        print("\n".join(f"{arguments.destination}/{file}" for file in files))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from .methods import described
    from .tables import print_methods

    found = described(arguments.name)
    if arguments.json:
        _print_json(found)
    else:
        print_methods(found)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine
    from .tables import print_findings

    findings = examine(arguments.places, address=arguments.address)
    if arguments.json:
        _print_json([vars(finding) for finding in findings])
    else:
        print_findings(findings)
    return 0 if all(finding.ok for finding in findings) else 5


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


def _message(text: str) -> None:
    print(text, file=sys.stderr)


def _complain(what: object, code: int) -> int:
    _message(f"fleetpress: {what}")
    return code
