"""What the verbs of the command line share: options, and what goes to stdout and stderr."""

import argparse
import codecs
import io
import json
import os
import sys
from typing import Any, TextIO

from ..runs import log_lines

EXIT_CODES = """exit codes: 0 all published or unchanged; 2 wrong usage or spec; 3 some models rejected or failed;
4 none succeeded; 5 storage or cluster unreachable; 1 our own bug; 130 interrupted"""
SPEC_HELP = "the spec: path or s3:// uri of a YAML file (`fleetpress init` writes a first one)"


def add_verb(verbs: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    """A verb that `function` answers with the exit code."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary, epilog=EXIT_CODES
    )
    verb.add_argument("--json", action="store_true", help="machine-readable output")
    verb.set_defaults(verb=function)
    return verb


def executor_options(verb: argparse.ArgumentParser) -> None:
    """Where the tasks of a run are worked on."""
    verb.add_argument(
        "--executor", choices=("ray", "inline"), default="ray", help="where tasks run (default: ray)"
    )
    verb.add_argument(
        "--address", help="Ray cluster, host:port (default: RAY_ADDRESS, else one on this machine)"
    )


def log_options(verb: argparse.ArgumentParser) -> None:
    """How a run is told on stderr."""
    verb.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="lines on stderr: words, or one JSON object each (default: %(default)s)",
    )


def print_json(value: Any) -> None:
    """Data, on stdout."""
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=not _is_utf8(sys.stdout)))


def keep_stdout_for_data() -> None:
    """Leave descriptor 1 to messages: native libraries print there whatever they are told, as SciPy 1.17's HiGHS does.

    `sys.stdout` goes on where it went; to nowhere, if it is closed. Nothing is done where it was replaced already, or
    where stderr is closed.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # as long as the process
    before = sys.stdout
    if before is not sys.__stdout__ or not isinstance(before, io.TextIOWrapper) or sys.stderr is None:
        return
    before.flush()
    data = os.dup(before.fileno())
    os.dup2(sys.stderr.fileno(), before.fileno())
    is_live = before.line_buffering or before.write_through
    sys.stdout = open(  # noqa: SIM115  # as long as the process
        data, "w", buffering=1 if is_live else -1, encoding=before.encoding, errors=before.errors
    )


def show_every_name() -> None:
    """Escape what a terminal or a log of another encoding cannot show: names of models may be in any script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _is_utf8(stream):
            stream.reconfigure(errors="backslashreplace")


def _is_utf8(stream: TextIO) -> bool:
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name == "utf-8"


def message(text: str) -> None:
    """Words, on stderr."""
    log_lines.say(text)
