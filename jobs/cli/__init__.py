"""The command line: `fleetpress VERB`. Data on stdout, messages on stderr, the documented exit codes.

Heavy imports (torch, ray, boto3) stay inside the verbs that need them: `--help` and `status` load none of them.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fleetpress.storage.errors import UNUSABLE_STORE, StorageError

from ..errors import FleetpressError
from ..runs import log_lines
from . import about, artifacts, beginning, runs, schedules, submitting
from .mistakes import Parser
from .options import EXIT_CODES, keep_stdout_for_data, message, show_every_name

__all__ = ["EXIT_CODES", "main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is the answer. User errors become one message on stderr, never a traceback."""
    keep_stdout_for_data()
    show_every_name()
    arguments = parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_lines.Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        os.getcwd()
    except FileNotFoundError:
        return _complain("the folder that you are in is gone; change to another one", 2)
    with log_lines.written_as(getattr(arguments, "log_format", "text")):
        return _answer(arguments)


def parser() -> argparse.ArgumentParser:
    """Every verb with its options; the README's table is made from it."""
    top = Parser(
        prog="fleetpress",
        description="Compress fleets of models: prune, quantize, validate and publish, on Ray, from and to S3.",
        epilog=f"begin with `fleetpress demo`, or `fleetpress init FOLDER`; how-to pages are in docs/. {EXIT_CODES}",
    )
    top.add_argument("--version", action="version", version=f"fleetpress {version('fleetpress')}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in (beginning, runs, submitting, schedules, artifacts, about):
        module.add_verbs(verbs)
    return top


def _answer(arguments: argparse.Namespace) -> int:
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


def _complain(what: object, code: int) -> int:
    message(f"fleetpress: {what}")
    return code
