"""Verbs that tell of fleetpress itself and of this machine."""

import argparse
from typing import Any

from .options import add_verb, print_json


def add_verbs(verbs: Any) -> None:
    """methods, doctor."""
    verb = add_verb(verbs, "methods", _methods, "methods, schemes, losses, metrics; one of them in full")
    verb.add_argument("name", metavar="NAME", nargs="?")

    verb = add_verb(verbs, "doctor", _doctor, "what works here: storage, conditional writes, Ray, versions")
    verb.add_argument("places", metavar="URI", nargs="*", help="outputs or sources to try")
    verb.add_argument("--address", help="Ray cluster to try (default: RAY_ADDRESS, if set)")


def _methods(arguments: argparse.Namespace) -> int:
    from ..methods import described
    from ..tables import print_methods

    found = described(arguments.name)
    if arguments.json:
        print_json(found)
    else:
        print_methods(found)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from ..doctor import examine
    from ..tables import print_findings

    findings = examine(arguments.places, address=arguments.address)
    if arguments.json:
        print_json([vars(finding) for finding in findings])
    else:
        print_findings(findings)
    return 0 if all(finding.ok for finding in findings) else 5
