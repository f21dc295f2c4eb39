"""Verbs of what an output holds."""

import argparse
from typing import Any

from ..errors import UsageError
from .job_places import list_jobs
from .options import add_verb, message, print_json


def add_verbs(verbs: Any) -> None:
    """list, verify, dequantize, export, gc."""
    verb = add_verb(verbs, "list", _list, "published models of an output; jobs of an output or of a cluster")
    verb.add_argument("output", metavar="OUTPUT", nargs="?")
    verb.add_argument(
        "--jobs", action="store_true", help="the jobs that worked on the output, and their runs"
    )
    verb.add_argument("--address", metavar="URL", help="the jobs that this cluster knows: http://head:8265")

    verb = add_verb(verbs, "verify", _verify, "prove an artifact again: files, hashes, a run of the model")
    verb.add_argument(
        "artifact", metavar="ARTIFACT", help="<output>/models/<name> or <output>/models/<name>/<digest>"
    )
    verb.add_argument(
        "--deep",
        action="store_true",
        help="decode every weight of a checkpoint and compare it with the source",
    )

    verb = add_verb(verbs, "dequantize", _dequantize, "plain weights back from an artifact")
    verb.add_argument("artifact", metavar="ARTIFACT")
    verb.add_argument("destination", metavar="DEST", help="folder or s3:// prefix to write to")

    verb = add_verb(verbs, "export", _export, "an artifact's model as a file that others read")
    verb.add_argument("artifact", metavar="ARTIFACT")
    verb.add_argument(
        "--to",
        dest="form",
        metavar="FORMAT",
        required=True,
        choices=("pt2", "safetensors"),
        help="pt2: packed weights, torch.export.load runs it; safetensors: plain weights by name",
    )
    verb.add_argument("destination", metavar="DEST", help="folder or s3:// prefix to write to")

    verb = add_verb(verbs, "gc", _gc, "what is left over in an output; deletes it only when told")
    verb.add_argument("output", metavar="OUTPUT", help="the `output` of a spec")
    verb.add_argument(
        "--delete", action="store_true", help="delete what is listed; start no run at the same time"
    )
    verb.add_argument(
        "--superseded", action="store_true", help="also artifacts that a newer one of the model has replaced"
    )


def _list(arguments: argparse.Namespace) -> int:
    if arguments.address or arguments.jobs:
        return list_jobs(arguments)
    if arguments.output is None:
        raise UsageError("nothing to list; give an OUTPUT, or --address URL for the jobs of a cluster")
    from fleetpress.storage.near_misses import hint

    from ..artifacts import published
    from ..tables import print_published

    found = published(arguments.output)
    if arguments.json:
        print_json(found)
    else:
        print_published(found)
    if not found and (meant := hint(arguments.output)):
        message(f"{arguments.output} is not there{meant}")
    return 0


_PROVED = {
    False: "every file is what was published, and the model loads",
    True: "every file is what was published, and every weight what its source becomes",
}


def _verify(arguments: argparse.Namespace) -> int:
    from ..artifacts import verify

    problems = verify(arguments.artifact, deep=arguments.deep)
    if arguments.json:
        print_json({"artifact": arguments.artifact, "ok": not problems, "problems": problems})
    elif problems:
        print("\n".join(problems))
    else:
        print(f"{arguments.artifact}: {_PROVED[arguments.deep]}")
    return 3 if problems else 0


def _dequantize(arguments: argparse.Namespace) -> int:
    from ..artifacts import dequantize

    return _written(arguments, dequantize(arguments.artifact, arguments.destination))


def _export(arguments: argparse.Namespace) -> int:
    from ..artifacts import export

    return _written(arguments, export(arguments.artifact, arguments.form, arguments.destination))


def _written(arguments: argparse.Namespace, files: list[str]) -> int:
    if arguments.json:
        print_json({"destination": arguments.destination, "files": files})
    else:
        print("\n".join(f"{arguments.destination}/{file}" for file in files))
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.store import open_store

    from ..gc import delete_leftovers, find_leftovers
    from ..tables import print_leftovers

    store = open_store(arguments.output)
    found = find_leftovers(store, superseded=arguments.superseded)
    if arguments.delete:
        found = delete_leftovers(store, found)
    if arguments.json:
        print_json(found.as_dict())
    else:
        print_leftovers(found, deleted=arguments.delete)
    return 0
