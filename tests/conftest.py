"""Fixtures for every test: stores (folder, moto, SeaweedFS), one Ray cluster, and a quiet environment."""

import gc
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.seaweed import SeaweedFS, start_seaweedfs
from fleetpress.storage.s3_client import shared_client
from fleetpress.storage.store import ObjectStore, open_store

sys.path += [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parent)]

from fork_server import quicken_archives

# Constant, so that processes started with moto's address once keep working for the whole session.
_MOTO_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "moto",
    "AWS_SECRET_ACCESS_KEY": "moto-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
# What a developer's shell may hold must not decide a test.
_AWS_VARIABLES = (
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)
# Variables that decide what a later test does; others are set by torch, Ray and scikit-learn when they are first used.
_DECIDING = (
    *("AWS_", "FLEETPRESS_", "HF_", "HOME", "PATH", "PYTHONPATH", "TMPDIR", "XDG_"),
    *("RAY_ADDRESS", "RAY_AUTH_", "RAY_TMPDIR"),
)
_ENVIRONMENT = pytest.StashKey[dict[str, str]]()
_FILES = pytest.StashKey[set[str]]()
# `make test` runs files side by side. Those that name one of these words share a worker: what they need is made ready
# once, and there are never two Ray clusters at work.
_LANES = {
    "ray_cluster": "ray",
    "ray_hosts": "ray",
    "courses": "crashes",
    "shared_runner": "forks",
    "architectures": "nets",
    "architecture": "nets",  # each is exported once
}
# Short files end the session, so that no worker is left alone with a long one: first the lanes, then whole programs.
_LONG = tuple(dict.fromkeys(_LANES.values()))
_PROGRAMS = re.compile(r"tests/(end_to_end/|docs/|fuzz/|test_)")


@cache
def _lane(path: Path) -> str:
    words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return next((shared for word, shared in _LANES.items() if word in words), "")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files go to a worker, which makes ready what they share; one Ray cluster is enough for 2 CPUs."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _lane(config.rootpath / file) or file

    config.option.loadscopereorder = (
        False  # many tests are not a long time; `pytest_collection_modifyitems` knows
    )
    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which lanes and files begin."""

    def rank(item: pytest.Item) -> int:
        lane = _lane(item.path)
        return _LONG.index(lane) if lane else len(_LONG) + (_PROGRAMS.match(item.nodeid) is None)

    items.sort(key=rank)


def pytest_configure(config: pytest.Config) -> None:
    """Ray reads these once, when it is imported: a token of this session's own, loopback only, nothing sent out.

    Ctrl-C works for every process that a test starts, also where the tests run in the background of a script.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_FILES] = set(os.listdir(config.rootpath))
    folder = tempfile.TemporaryDirectory(prefix="fleetpress-ray-token-")
    config.add_cleanup(folder.cleanup)
    token = Path(folder.name) / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    logging.getLogger("torch.__trace").propagate = False  # a record for every step of every export
    gc.set_threshold(
        50_000, 20
    )  # with all libraries loaded, to look for cycles more often takes a seventh of the time


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No file of the developer's home is read or written, and no cloud address is asked for credentials."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("AWS_CONFIG_FILE", str(home / "aws-config"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "aws-credentials"))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in _AWS_VARIABLES:
            patch.delenv(name, raising=False)
        request.config.stash[_ENVIRONMENT] = _environment()
        yield
        del request.config.stash[_ENVIRONMENT]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A test that leaves variables behind, by itself or by a fixture that outlives it, would decide those after it.

    One that leaves files in the repository has written where it did not mean to.
    """
    yield
    left = {name for name in os.listdir(item.config.rootpath) if name[0] != "."} - item.config.stash[_FILES]
    if left:
        item.config.stash[_FILES] |= left
        pytest.fail(f"the test, or one beside it, leaves in the repository: {', '.join(left)}", pytrace=False)
    after = _environment()
    before = item.config.stash.get(_ENVIRONMENT, after)  # nothing any more once the last test has ended
    if after == before:
        return
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    changed = sorted({name for name, _ in after.items() ^ before.items()})
    pytest.fail(
        f"the test or one of its fixtures leaves these variables changed: {', '.join(changed)}", pytrace=False
    )


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_DECIDING)}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in the same order everywhere, and room for the other test processes."""
    import torch

    torch.set_num_threads(1)
    quicken_archives()


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """The endpoint of a moto server; any credentials do."""
    from botocore import utils
    from moto import backends
    from moto.server import ThreadedMotoServer

    modules = tuple(backends.list_of_moto_modules())
    with pytest.MonkeyPatch.context() as patch:
        # For every request it looks through its own folders, which takes a fifth of the time.
        patch.setattr(backends, "list_of_moto_modules", lambda: iter(modules))
        # Server and client read the same times again for every object of every list.
        patch.setattr(utils, "_parse_timestamp_with_tzinfo", cache(utils._parse_timestamp_with_tzinfo))
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def s3_uri(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket on moto, with the AWS_* variables that lead to it."""
    _set_environment(monkeypatch, {"AWS_ENDPOINT_URL": moto_server, **_MOTO_CREDENTIALS})
    bucket = f"bucket-{secrets.token_hex(6)}"
    shared_client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server, which checks credentials."""
    with start_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweed_bucket(seaweedfs: SeaweedFS) -> str:
    """A bucket for the whole session: making one takes SeaweedFS a second."""
    return seaweedfs.create_bucket(f"bucket-{secrets.token_hex(6)}")


@pytest.fixture
def seaweed_uri(seaweedfs: SeaweedFS, seaweed_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on SeaweedFS, with the AWS_* variables that lead to it."""
    _set_environment(monkeypatch, seaweedfs.environment)
    return f"{seaweed_bucket}/{secrets.token_hex(6)}"


@pytest.fixture(params=["folder", "moto"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, once in a folder and once on moto."""
    return str(tmp_path / "store") if request.param == "folder" else str(request.getfixturevalue("s3_uri"))


@pytest.fixture
def store(store_uri: str) -> ObjectStore:
    """An empty store, once a folder and once on moto."""
    return open_store(store_uri)


@pytest.fixture(scope="session")
def ray_cluster(moto_server: str) -> Iterator[None]:
    """One Ray cluster for the session, of 2 CPUs; `pytest_configure` has given it a token of its own.

    Workers keep the environment of this moment: moto is the S3 they know (`s3_uri` gives buckets on it).
    """
    import ray

    with (
        pytest.MonkeyPatch.context() as patch
    ):  # for the workers only: a test that wants S3 asks for `s3_uri`
        _set_environment(patch, {"AWS_ENDPOINT_URL": moto_server, **_MOTO_CREDENTIALS})
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=128 << 20,
            _system_config={"metrics_report_interval_ms": 1000},  # a test waits for them
        )
    yield
    ray.shutdown()


def _set_environment(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in _AWS_VARIABLES:
        patch.delenv(name, raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)
