#!/usr/bin/env python3
"""Stands in for `aws`: knows `s3 cp FOLDER s3://BUCKET/PREFIX --recursive` alone, and really copies."""

import json
import os
import sys
from pathlib import Path

words = sys.argv[1:]
with open(os.path.join(os.environ["STAND_IN_LOGS"], ".aws.jsonl"), "a") as log:
    log.write(json.dumps(words) + "\n")
if words[:2] != ["s3", "cp"] or words[4:] != ["--recursive"] or not words[3].startswith("s3://"):
    sys.exit(f"aws: unexpected arguments: {words}")
folder = Path(words[2])
if not folder.is_dir():
    sys.exit(f"The user-provided path {folder} does not exist.")

import boto3  # noqa: E402 - only now is it needed

bucket, _, prefix = words[3].removeprefix("s3://").partition("/")
client = boto3.client("s3")
for path in sorted(folder.rglob("*")):
    if path.is_file():
        client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")
