"""The peer, run in an environment of its own: llm-compressor's conversion of a checkpoint without its model.

    VENV/bin/python benchmarks/checkpoints/peer.py SRC DST SCHEME

SRC and DST are folders, or s3://bucket/prefix each: then every file is downloaded first, every file of the result
uploaded last, as one does by hand. Embedding and head are left alone. Prints the seconds of each stage as JSON. The
environment: a venv with torch 2.13.0, then `pip install -r benchmarks/checkpoints/peer_requirements.txt`; nothing of
fleetpress is in it.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

IGNORE = ["lm_head", "model.embed_tokens"]


def main() -> None:
    """Convert what the command line names."""
    source, destination, scheme = sys.argv[1:]
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 3)
        clock = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain"), Path(folder, "packed")
        if source.startswith("s3://"):
            download(source, plain)
            lap("download")
        from llmcompressor import model_free_ptq

        lap("import")
        model_free_ptq(
            str(plain) if source.startswith("s3://") else source,
            str(packed) if destination.startswith("s3://") else destination,
            scheme=scheme,
            ignore=IGNORE,
            max_workers=1,
            device="cpu",
        )
        lap("convert")
        if destination.startswith("s3://"):
            upload(packed, destination)
            lap("upload")
    print(json.dumps(seconds))


def download(uri: str, folder: Path) -> None:
    """Every object below the prefix, by boto3's own transfer with its defaults."""
    client, bucket, prefix = place(uri)
    folder.mkdir()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for item in page["Contents"]:
            client.download_file(bucket, item["Key"], str(folder / Path(item["Key"]).name))


def upload(folder: Path, uri: str) -> None:
    """Every file of the folder, likewise."""
    client, bucket, prefix = place(uri)
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


def place(uri: str) -> tuple[Any, str, str]:
    """A client for the AWS_* variables, the bucket and the prefix of a uri."""
    import boto3
    from botocore.config import Config

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"})), bucket, prefix


if __name__ == "__main__":
    main()
