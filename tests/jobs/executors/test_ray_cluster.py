"""The cluster under the executor: what its nodes hold, and addresses where no cluster is, or another one."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray

from fleetpress.jobs.errors import ClusterUnreachable, UsageError
from fleetpress.jobs.executors.ray_cluster import Room, adopt_aws_variables, connect, problem_of
from fleetpress.jobs.tasks import Task

GIB = 2**30


def task(memory_gib: int = 0) -> Task:
    return Task(id="t", model="m", kind="quantize", digest="t", memory_bytes=memory_gib * GIB)


def test_adopting_variables_removes_what_the_driver_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old")
    monkeypatch.setenv("AWS_REGION", "a")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    adopt_aws_variables({"AWS_REGION": "b"})
    left = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert left == {"AWS_REGION": "b"}


@pytest.mark.parametrize(
    ("workers", "memory_gib", "fits"),
    [(1, 0, True), (6, 0, True), (7, 0, False), (3, 2, True), (4, 2, False), (1, 4, True), (1, 5, False)],
)
def test_room_counts_cpus_and_memory_of_each_node(workers: int, memory_gib: int, fits: bool) -> None:
    rooms = [Room(cpus=2, memory_bytes=4 * GIB), Room(cpus=4, memory_bytes=3 * GIB)]
    problem = problem_of(task(memory_gib), workers, rooms)
    assert bool(problem) != fits


def test_a_cluster_without_cpus_yet_is_waited_for() -> None:
    assert problem_of(task(), 1, []) == ""


# ---- addresses


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def talking_server() -> Iterator[int]:
    """A port that speaks, but no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


@pytest.fixture
def other_server() -> Iterator[int]:
    """A port that speaks as a cluster's head does."""
    server = grpc.server(ThreadPoolExecutor(1))
    port: int = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_nothing_listens(not_connected: None, prefix: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    told = f"no Ray cluster answers at {prefix}127.0.0.1:{port}.*--address"
    with pytest.raises(ClusterUnreachable, match=told):
        connect(f"{prefix}127.0.0.1:{port}")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("kind", ["silent_server", "talking_server"])
def test_something_else_listens(not_connected: None, kind: str, request: pytest.FixtureRequest) -> None:
    port = request.getfixturevalue(kind)
    started = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=f"127.0.0.1:{port} is no Ray cluster"):
        connect(f"127.0.0.1:{port}", deadline_seconds=2)
    assert time.monotonic() - started < 5


def test_another_cluster_than_the_connected_one_is_refused(ray_cluster: None, other_server: int) -> None:
    """The run would go to the connected one without a word."""
    head = ray.get_runtime_context().gcs_address
    for address in (None, "auto", head):
        assert connect(address) is False
    other = f"127.0.0.1:{other_server}"
    with pytest.raises(UsageError, match=f"{head} already, and {other} is another address; leave"):
        connect(other)


def test_the_connected_cluster_is_known_by_its_other_addresses(
    ray_cluster: None, other_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that of its server for clients, and by the one it was joined with, which a tunnel may lead to."""
    host, _, port = ray.get_runtime_context().gcs_address.partition(":")
    assert connect(f"ray://{host}:{port}") is False
    joined = f"127.0.0.1:{other_server}"
    monkeypatch.setattr("fleetpress.jobs.executors.ray_cluster._joined", {})
    with monkeypatch.context() as patch:
        patch.setattr(ray, "init", lambda **_options: None)
        patch.setattr(ray, "is_initialized", lambda: False)
        assert connect(joined) is False
    assert connect(joined) is False


@pytest.mark.parametrize("address", ["nonsense", "host:", ":1", "host:99999", "http://host/x"])
def test_no_address_at_all(not_connected: None, address: str) -> None:
    with pytest.raises(UsageError, match=r"is no address of a Ray cluster|is the address of a web page"):
        connect(address)


def test_a_host_that_does_not_exist(not_connected: None) -> None:
    with pytest.raises(ClusterUnreachable, match=r"no Ray cluster answers at ray\.invalid:6379"):
        connect("ray.invalid:6379")


def test_no_cluster_on_this_machine_to_join(not_connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterUnreachable, match="cannot join the Ray cluster at auto: Could not find any"):
        connect("auto")
