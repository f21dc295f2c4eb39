"""The Ray cluster under the executor: connect or start, and what its nodes have room for."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ..errors import ClusterUnreachable, UsageError
from ..tasks import Task
from .address import host_and_port

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_HEAD_SECONDS = 12.0  # the head may be busy, or come back after a short fault of the network
_OBJECT_STORE_BYTES = 128 * 2**20  # tensors never travel through Ray

_joined: dict[str, str] = {}  # by the address that a cluster was joined with, that of its head


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one living node offers to tasks."""

    cpus: int
    memory_bytes: int
    gpus: float = 0.0

    def fits(self, memory_bytes: int, gpus: float = 0.0) -> int:
        """How many one-CPU workers of `memory_bytes` and `gpus` each the node holds when it is empty."""
        most = self.cpus if memory_bytes == 0 else min(self.cpus, self.memory_bytes // memory_bytes)
        # No worker's share is split between two GPUs; 1e-9: three thirds are one.
        return most if gpus == 0 else min(most, int(self.gpus) * int(1 / gpus + 1e-9))


def connect(address: str | None, deadline_seconds: float = 10.0) -> bool:
    """Join the cluster at `address`, or start one on this machine; True if it was started here.

    A cluster that this process is connected to already is reused. Raises UsageError for what is no address and for
    that of another cluster than the connected one, and ClusterUnreachable, within about `deadline_seconds`, when
    nothing, or something that is not Ray, is at the address.
    """
    if address is not None and address != "auto":
        _probe(address, deadline_seconds)
        if ray.is_initialized():
            _check_connected(address)
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        _start()
        return True
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnreachable(
            f"cannot join the Ray cluster at {address}: {_one_line(error)}; check the address, that driver and cluster"
            " have the same Ray and Python versions, and RAY_AUTH_TOKEN if the cluster wants a token"
        ) from error
    _joined[address] = _head()
    return False


def is_on_this_machine() -> bool:
    """True if every node of the cluster is this machine, so that nothing given to a worker leaves it."""
    here = {"127.0.0.1", ray.util.get_node_ip_address()}  # type: ignore[no-untyped-call]
    return all(node["NodeManagerAddress"] in here for node in _living_nodes())


def this_node() -> tuple[str, str]:
    """The id of the node that a worker is on, and its name for people: address and the id's first signs."""
    node = ray.get_runtime_context().get_node_id()
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return node, f"{address}/{node[:6]}"


class Lookout:
    """The nodes of the cluster as they were a moment ago, looked at by a thread: calls to a dead head hang."""

    def __init__(self) -> None:
        self._nodes = _living_nodes()
        self._free: Mapping[str, float] = {}
        self.losses = 0  # of nodes, since the beginning
        self._all_rooms = {str(node["NodeID"]): _room(node) for node in self._nodes}
        self._seen = self._had_cpus = time.monotonic()
        self._end = threading.Event()
        threading.Thread(target=self._look_on, name="lookout", daemon=True).start()

    @property
    def is_gone(self) -> bool:
        """Whether the head has not answered for some time."""
        return time.monotonic() - self._seen > _HEAD_SECONDS

    def check(self, grace_seconds: float) -> None:
        """Raises ClusterUnreachable for a head that is gone, and for nodes that all went `grace_seconds` ago."""
        remedy = "what was finished is kept; run again when there is a cluster"
        if self.is_gone:
            raise ClusterUnreachable(f"the head of the Ray cluster is gone: {remedy}")
        if self.all_rooms() and self._seen - self._had_cpus > grace_seconds:
            raise ClusterUnreachable(f"every node of the Ray cluster that had CPUs is gone: {remedy}")

    def node_ids(self) -> set[str]:
        """Ids of the living nodes."""
        return {str(node["NodeID"]) for node in self._nodes}

    def rooms(self) -> list[Room]:
        """What each living node offers, the largest memory first."""
        return rooms(self._nodes)

    def all_rooms(self) -> list[Room]:
        """The same of every node that was ever seen: another one like it may come."""
        return _sorted(self._all_rooms.values())

    def would_begin(self, task: Task) -> bool:
        """Whether so much is free that the task cannot be waiting for room, however the free room is spread."""
        free, nodes = self._free, len(self.rooms())
        has_gpu = not task.gpus or free.get("GPU", 0) >= nodes
        return (
            has_gpu
            and free.get("CPU", 0) >= max(1, nodes)
            and free.get("memory", 0) >= nodes * task.memory_bytes
        )

    def end(self) -> None:
        """Look no more."""
        self._end.set()

    def _look_on(self) -> None:
        while not self._end.wait(_LOOK_SECONDS):
            try:
                nodes, free = _living_nodes(), ray.available_resources()  # type: ignore[no-untyped-call]
            except Exception as error:  # noqa: BLE001 - Ray has many ways to say that it is shutting down
                _log.debug("no look at the nodes: %s", error)
                continue
            before, self._nodes, self._free = self.node_ids(), nodes, free
            self.losses += len(before - self.node_ids())
            self._seen = time.monotonic()
            self._all_rooms |= {str(node["NodeID"]): _room(node) for node in nodes}
            if self.rooms():
                self._had_cpus = self._seen


def rooms(nodes: Sequence[Mapping[str, Any]] | None = None) -> list[Room]:
    """What each living node offers, the largest memory first; without `nodes`, as it is now."""
    return _sorted(map(_room, _living_nodes() if nodes is None else nodes))


def _room(node: Mapping[str, Any]) -> Room:
    resources = node["Resources"]
    return Room(
        cpus=int(resources.get("CPU", 0)),
        memory_bytes=int(resources.get("memory", 0)),
        gpus=float(resources.get("GPU", 0)),
    )


def _sorted(found: Iterable[Room]) -> list[Room]:
    return sorted((room for room in found if room.cpus), key=lambda room: (-room.memory_bytes, -room.cpus))


def problem_of(task: Task, workers: int, found: list[Room]) -> str:
    """Why the cluster can never run `workers` workers of the task at once; empty if it can.

    Ray itself would let such a task wait for ever.
    """
    if not found:
        return ""  # only a head without CPUs yet: an autoscaler may be about to bring nodes
    if sum(room.fits(task.memory_bytes, task.gpus) for room in found) >= workers:
        return ""
    problem = gpu_problem(task.gpus, found)
    if problem:
        return problem
    asked = f"{workers} CPU" + (
        f" with {_gib(task.memory_bytes)} of memory each" if task.memory_bytes else ""
    )
    asked += f" and {task.gpus:g} GPU each" if task.gpus else ""
    largest = f"{found[0].cpus} CPU and {_gib(found[0].memory_bytes)}"
    total = sum(room.cpus for room in found)
    return (
        f"{task.kind} asks for {asked}, which the cluster can never give: {len(found)} nodes with {total} CPU in"
        f" all, the largest with {largest} of memory; lower resources.memory_per_task or resources.workers, or"
        " add larger nodes"
    )


def gpu_problem(gpus: float, found: list[Room]) -> str:
    """Why no task can have `gpus`; empty if one can, or only a head without CPUs is there yet."""
    if not gpus or not found or any(room.fits(0, gpus) for room in found):
        return ""
    return (
        f"resources.gpus_per_task asks for {gpus:g} GPU a task, and none of the cluster's {len(found)} nodes has any: "
        "add a node with a GPU (of a type that scales from zero, keep one while the run begins), or leave it out"
    )


def aws_variables() -> dict[str, str]:
    """The AWS_* variables of this process, credentials among them: never log them, never send them away."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def adopt_aws_variables(variables: Mapping[str, str]) -> None:
    """Make the AWS_* variables of this worker equal to `variables`; workers live longer than a driver's settings."""
    for name in aws_variables().keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _living_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _start() -> None:
    _own_token()
    ray.init(
        address="local",  # without it Ray joins whatever cluster was last started on this machine
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def _own_token() -> None:
    """Give clusters started here a token of this process; Ray would write one into the home folder."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="fleetpress-ray-"))  # readable by its owner only
    path = folder / "token"
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _probe(address: str, deadline_seconds: float) -> None:
    """Refuse an address where no gRPC server answers: Ray would retry for minutes."""
    host, port = host_and_port(address)
    remedy = "start the cluster, or correct --address or RAY_ADDRESS (host:port)"
    try:
        socket.create_connection((host, port), timeout=deadline_seconds / 2).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"no Ray cluster answers at {address} ({error.strerror or error}); {remedy}"
        ) from error
    if os.environ.get("RAY_USE_TLS") == "1":
        return  # only Ray has the certificates to go on
    import grpc  # type: ignore[import-untyped]  # comes with Ray

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=deadline_seconds / 2)
        except grpc.FutureTimeoutError as error:
            raise ClusterUnreachable(f"what listens at {address} is no Ray cluster; {remedy}") from error


def _check_connected(address: str) -> None:
    """Refuse another cluster than the one that this process is connected to: Ray has one connection a process."""
    head = _head()
    (host, port), (its_host, its_port) = host_and_port(address), host_and_port(head)
    same_port = port == its_port or address.startswith("ray://")  # which is another port of the head
    if _joined.get(address) == head or (same_port and _numbers(host) & _numbers(its_host)):
        return
    raise UsageError(
        f"this process is connected to the Ray cluster at {head} already, and {address} is another address; leave"
        " the address out, or call ray.shutdown() first"
    )


def _head() -> str:
    """Where the head of the connected cluster listens."""
    address: str = ray.get_runtime_context().gcs_address
    return address


def _numbers(host: str) -> set[str]:
    """What a host's name stands for."""
    try:
        return {str(place[0]) for *_, place in socket.getaddrinfo(host, None)}
    except OSError:
        return {host}


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
