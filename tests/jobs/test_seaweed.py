"""The real server of the demo: found or named, on loopback only, gone afterwards."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

from fleetpress.jobs import seaweed
from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.seaweed import find_weed, start_seaweedfs
from fleetpress.storage.errors import StoreUnreachable


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seaweed.shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(UsageError, match=r"fleetpress\[demo\]"):
        find_weed()


def test_runs_and_ends(tmp_path: Path) -> None:
    with start_seaweedfs(tmp_path / "data") as server:
        endpoint, access_key, secret_key = server
        assert server.create_bucket("models") == "s3://models"
        assert len({endpoint, access_key, secret_key}) == 3
        assert endpoint.startswith("http://127.0.0.1:")
        with pytest.raises(HTTPError) as refused:  # nothing without credentials
            urllib.request.urlopen(f"{endpoint}/models", timeout=5)
        assert refused.value.code == 403
    with pytest.raises(URLError):
        urllib.request.urlopen(endpoint, timeout=5)


def test_a_server_that_dies_is_reported(tmp_path: Path) -> None:
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho no luck\nexit 1\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seaweed, "find_weed", lambda: str(program))
        with pytest.raises(StoreUnreachable, match=r"seaweedfs\.log"), start_seaweedfs(tmp_path / "data"):
            pass
    assert (tmp_path / "data" / "seaweedfs.log").read_text() == "no luck\n"


def test_needs_neither_torch_nor_ray() -> None:
    code = "import sys, fleetpress.jobs.seaweed; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0
