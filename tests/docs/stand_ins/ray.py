#!/usr/bin/env python3
"""Stands in for `ray`: writes its arguments down; the test gives them to Ray's own parser."""

import json
import os
import sys
from pathlib import Path

words = sys.argv[1:]
with open(os.path.join(os.environ["STAND_IN_LOGS"], ".ray.jsonl"), "a") as log:
    log.write(json.dumps(words) + "\n")
for word in words:
    if word.endswith(".yaml") and not Path(word).is_file():
        sys.exit(f"ray: {word}: no such file")
if words[:1] == ["up"] and not list(Path("dist").glob("fleetpress-*.whl")):
    sys.exit("ray: file_mounts: ./dist holds no wheel")
