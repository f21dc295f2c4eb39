#!/usr/bin/env python3
"""Stands in for `kubectl`: knows what the pages use, looks at what it is given, and writes its arguments down."""

import json
import os
import re
import sys
from pathlib import Path

import yaml

words = sys.argv[1:]
with open(os.path.join(os.environ["STAND_IN_LOGS"], ".kubectl.jsonl"), "a") as log:
    log.write(json.dumps(words) + "\n")

_NAME = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
_KNOWN = (
    rf"create secret generic {_NAME}( --from-literal=[A-Z_]+=\S+)+",
    r"(apply|delete) -f \S+",
    r"get [a-z]+(,[a-z]+)*( -l [a-z./-]+=[a-z-]+)?",
    rf"describe cronjob {_NAME}",
)
if not any(re.fullmatch(form, " ".join(words)) for form in _KNOWN):
    sys.exit(f"kubectl: unexpected arguments: {words}")
if words[0] in ("apply", "delete"):
    for document in yaml.safe_load_all(Path(words[2]).read_text()):
        if not {"apiVersion", "kind", "metadata"} <= document.keys() or "name" not in document["metadata"]:
            sys.exit(f"kubectl: {words[2]} holds what is no object")
        print(f"{document['kind'].lower()}/{document['metadata']['name']} configured")
