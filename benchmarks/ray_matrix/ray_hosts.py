"""A Ray cluster of several nodes on this machine whose processes can be killed one by one.

    with Hosts(nodes=2) as hosts:
        hosts.kill_node(0)

The cluster runs in a process of its own (this file as a program); whatever it started is found by a mark in its
environment and ended with the context, however it went.
"""

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

MARK = "FLEETPRESS_HOSTS"
_STORE_BYTES = 100 << 20
_START_SECONDS = 90


class Hosts:
    """A head without CPUs, and `nodes` nodes of `cpus` CPUs; from entering to leaving the context.

    With `takes_jobs` it has a job server at `jobs_address`, and `python` is this Python there. `variables` are added to
    the environment of all of it.
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        cpus: int = 1,
        takes_jobs: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._nodes, self._cpus, self._takes_jobs = nodes, cpus, takes_jobs
        self.has_head = True
        self._variables = dict(variables or {})
        if takes_jobs:
            here = os.path.dirname(sys.executable)
            self._variables["PATH"] = os.pathsep.join((here, os.environ.get("PATH", os.defpath)))

    def __enter__(self) -> "Hosts":
        self.mark = secrets.token_hex(8)
        self.environment = self.new_environment()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._nodes), str(self._cpus), str(int(self._takes_jobs))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**self.environment, **self._variables, MARK: self.mark},
        )
        assert self._process.stdout is not None
        try:
            line = next((line for line in self._process.stdout if line.startswith("{")), "")
            told = json.loads(line)
        except ValueError:
            self.__exit__()
            raise RuntimeError("the cluster did not start") from None
        self.address: str = told["address"]
        self.jobs_address: str = told["jobs_address"]
        self._head: list[int] = told["head"]
        self._raylets: list[int] = told["nodes"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        end_marked(self.mark)
        shutil.rmtree(self.environment["RAY_TMPDIR"], ignore_errors=True)

    @staticmethod
    def new_environment(*, loopback: bool = True) -> dict[str, str]:
        """This process' environment, with a folder for a cluster and a new token in it.

        In Ray's usual folder, the cluster would leave its address for every later `ray.init()` of this machine.
        """
        folder = tempfile.mkdtemp(prefix="ray-")  # short enough for the paths of Ray's sockets
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            **({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if loopback else {}),
        }

    def workers(self) -> dict[int, tuple[int, str]]:
        """Workers with a task: process id -> index of the node, and the task (`train net-1`)."""
        return {
            process: (self._raylets.index(_parent(process)), task)
            for process, task, _ in titled_workers(self.mark)
            if _parent(process) in self._raylets
        }

    def kill_worker(self, kind: str) -> str:
        """Kill a worker that does a task of this kind, as soon as there is one; gives the task."""
        process, (_, task) = self._busy(kind)
        _kill(process)
        return task

    def kill_node(self, kind: str) -> str:
        """Kill a node with such a worker, and everything on it."""
        _, (node, task) = self._busy(kind)
        self._kill_node(self._raylets[node])
        return task

    def kill_any_worker(self, pick: random.Random) -> bool:
        """Kill the worker of some node; False if it has no task.

        The busier the cluster is the more is lost: a last task alone is not the only aim of every shot.
        """
        aim = pick.randrange(len(self._raylets))
        processes = sorted(process for process, (node, _) in self.workers().items() if node == aim)
        if processes:
            _kill(pick.choice(processes))
        return bool(processes)

    def replace_node(self, pick: random.Random) -> None:
        """Kill a node, and add another one."""
        self._kill_node(self._raylets.pop(pick.randrange(len(self._raylets))))
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write("node\n")
        stdin.flush()
        self._raylets.append(int(stdout.readline()))

    def kill_head(self) -> None:
        """Kill everything of the head."""
        self.has_head = False
        for process in self._head:
            _kill(process)

    def _kill_node(self, raylet: int) -> None:
        children = [process for process in _marked(self.mark) if _parent(process) == raylet]
        for process in (raylet, *children):
            _kill(process)

    def _busy(self, kind: str) -> tuple[int, tuple[int, str]]:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            for process, (node, task) in self.workers().items():
                if task.startswith(kind):
                    time.sleep(0.3)  # in the midst of it
                    return process, (node, task)
            time.sleep(0.05)
        raise TimeoutError(f"no worker does a task of the kind {kind}")


def end_marked(mark: str) -> None:
    """Kill every process with this mark in its environment."""
    for _ in range(5):  # a process may start another while we look
        marked = list(_marked(mark))
        for process in marked:
            _kill(process)
        if not marked:
            break
        time.sleep(0.2)


def titled_workers(mark: str) -> Iterator[tuple[int, str, bytes]]:
    """Workers with a task: process id, the task (`train net-1`), and the command line of their node."""
    for process in _marked(mark):
        title = _read(process, "cmdline").split(b"\0")[0].decode(errors="replace")
        if title.startswith("ray::") and " " in title:
            yield process, title.removeprefix("ray::"), _read(_parent(process), "cmdline")


def _marked(mark: str) -> Iterator[int]:
    wanted = f"{MARK}={mark}".encode()
    for name in os.listdir("/proc"):
        if (
            name.isdecimal()
            and int(name) != os.getpid()
            and wanted in _read(int(name), "environ").split(b"\0")
        ):
            yield int(name)


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def _parent(process: int) -> int:
    fields = _read(process, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _serve() -> None:
    """Start the cluster, say where it is, end with stdin."""
    from ray.cluster_utils import Cluster

    nodes, cpus, takes_jobs = (int(word) for word in sys.argv[1:])
    common = {"object_store_memory": _STORE_BYTES, "include_dashboard": False}
    server = {"dashboard_port": _free_port(), "include_dashboard": True, "dashboard_agent_listen_port": 0}
    head_args = {"num_cpus": 0, **common, **(server if takes_jobs else {})}
    cluster = Cluster(initialize_head=True, head_node_args=head_args)
    added = [cluster.add_node(num_cpus=cpus, **common) for _ in range(nodes)]
    head = [one.process.pid for many in cluster.head_node.all_processes.values() for one in many]
    raylets = [node.all_processes["raylet"][0].process.pid for node in added]
    jobs_address = f"http://{cluster.webui_url}" if takes_jobs else ""
    told = {"address": cluster.address, "jobs_address": jobs_address, "head": head, "nodes": raylets}
    print(json.dumps(told), flush=True)
    for _ in sys.stdin:  # a line asks for another node
        node = cluster.add_node(num_cpus=cpus, wait=False, **common)
        print(node.all_processes["raylet"][0].process.pid, flush=True)
    cluster.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    _serve()
