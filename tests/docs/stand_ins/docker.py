#!/usr/bin/env python3
"""Stands in for `docker`: knows `build -t IMAGE .` and `push IMAGE`, and looks whether what is copied is there."""

import re
import sys
from pathlib import Path

words = sys.argv[1:]
_IMAGE = r"[a-z0-9./-]+:[a-z0-9.-]+"
if not re.fullmatch(rf"build -t {_IMAGE} \.|push {_IMAGE}", " ".join(words)):
    sys.exit(f"docker: unexpected arguments: {words}")
if words[0] == "build":
    first, *lines = Path("Dockerfile").read_text().splitlines()
    if not first.startswith("FROM "):
        sys.exit("docker: Dockerfile does not begin with FROM")
    for line in lines:
        name, *rest = line.split() or [""]
        for pattern in rest[:-1] if name == "COPY" else []:
            if not list(Path().glob(pattern)):
                sys.exit(f"docker: COPY failed: no such file: {pattern}")
