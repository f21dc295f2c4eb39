"""Verbs for the first day: a spec to begin with, and the shell's help in typing."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .options import add_verb, message, print_json

_SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_verbs(verbs: Any) -> None:
    """init, completion."""
    verb = add_verb(verbs, "init", _init, "write a first spec, with comments, for the models at a place")
    verb.add_argument(
        "place", metavar="URI", help="a model, a folder or s3:// prefix with models, or a pattern"
    )
    verb.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        default="fleet.yaml",
        help="where to write it (default: %(default)s)",
    )
    verb.add_argument(
        "--output", metavar="URI", help="where the spec is to publish (default: beside the models)"
    )

    verb = add_verb(
        verbs, "completion", _completion, "completion of verbs and options: eval it in the shell's profile"
    )
    verb.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=f"one of {', '.join(_SHELLS)}")


def _init(arguments: argparse.Namespace) -> int:
    from ..spec.first_spec import first_spec
    from ..spec.fleet_spec import parse_spec

    text = first_spec(arguments.place, output=arguments.output).replace("THIS_FILE", arguments.file)
    models = len(parse_spec(text, arguments.file).models)  # what we write ourselves has to be right
    try:
        with Path(arguments.file).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{arguments.file} exists; name another file, or remove it first") from None
    except OSError as error:
        raise UsageError(
            f"{arguments.file}: cannot be written: {error.strerror}; name another file"
        ) from None
    if arguments.json:
        print_json({"file": arguments.file, "entries": models})
    else:
        print(arguments.file)
        message(f"read it, adapt it, then: fleetpress plan {arguments.file}")
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    from . import parser

    sys.stdout.write(shtab.complete(parser(), shell=arguments.shell))
    return 0
