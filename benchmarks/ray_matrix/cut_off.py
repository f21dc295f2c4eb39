"""Two Ray nodes in network namespaces of their own, and the cable between them; needs root and `ip`.

    with CutOff() as cable:
        cable.unplug()

Nothing listens on the machine's own interfaces: head, driver and the other node live inside the namespaces.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time

from ray_hosts import MARK, Hosts, end_marked, titled_workers

_HEAD, _NODE = "10.231.0.1", "10.231.0.2"
_PORT = 6379
_START_SECONDS = 60
# With Ray's own settings a node that is cut off counts as dead after 50 seconds.
_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_RAY = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; sys.exit(main())"


def missing() -> str:
    """Why it cannot be done here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    return "" if shutil.which("ip") else "needs the command ip"


class CutOff:
    """A head with one CPU in one namespace, a node with another in the second; from entering to leaving."""

    def __enter__(self) -> "CutOff":
        self._name = f"fp{secrets.token_hex(3)}"
        self.mark = secrets.token_hex(8)
        self.environment = Hosts.new_environment(loopback=False) | _HEALTH_CHECKS
        self.address = f"{_HEAD}:{_PORT}"
        try:
            self._lay_cable()
            common = [
                "--num-cpus=1",
                "--disable-usage-stats",
                "--block",
                f"--object-store-memory={100 << 20}",
            ]
            head = ["--head", f"--node-ip-address={_HEAD}", f"--port={_PORT}", "--include-dashboard=false"]
            self._ray("a", *head, *common)
            self._wait_for(1)
            self._ray("b", f"--address={self.address}", f"--node-ip-address={_NODE}", *common)
            self._wait_for(2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end_marked(self.mark)
        for side in "ab":
            subprocess.run(["ip", "netns", "del", self._name + side], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.environment["RAY_TMPDIR"], ignore_errors=True)

    def inside(self) -> list[str]:
        """What a command of the driver begins with."""
        return ["ip", "netns", "exec", f"{self._name}a"]

    def wait_for_work(self) -> None:
        """Until the other node trains something."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            for _, title, parent in titled_workers(self.mark):
                if title.startswith("train") and _NODE.encode() in parent:
                    time.sleep(1)  # in the midst of it
                    return
            time.sleep(0.02)
        raise TimeoutError("the other node trains nothing")

    def unplug(self) -> None:
        """Cut the node off."""
        subprocess.run(["ip", "-n", f"{self._name}a", "link", "set", "cable", "down"], check=True)

    def plug(self) -> None:
        """And back."""
        subprocess.run(["ip", "-n", f"{self._name}a", "link", "set", "cable", "up"], check=True)

    def _lay_cable(self) -> None:
        one, other = f"{self._name}a", f"{self._name}b"
        ends = ["cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other]
        for words in (["netns", "add", one], ["netns", "add", other], ["link", "add", *ends]):
            subprocess.run(["ip", *words], check=True)
        for side, address in ((one, _HEAD), (other, _NODE)):
            subprocess.run(["ip", "-n", side, "addr", "add", f"{address}/24", "dev", "cable"], check=True)
            for device in ("cable", "lo"):
                subprocess.run(["ip", "-n", side, "link", "set", device, "up"], check=True)

    def _ray(self, side: str, *arguments: str) -> None:
        subprocess.Popen(
            ["ip", "netns", "exec", self._name + side, sys.executable, "-c", _RAY, "start", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**self.environment, MARK: self.mark},
            start_new_session=True,
        )

    def _wait_for(self, nodes: int) -> None:
        """Until so many nodes are there."""
        code = (
            f"import ray; ray.init(address='{self.address}', log_to_driver=False, logging_level=50); "
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            done = subprocess.run(
                [*self.inside(), sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=False,
                env=self.environment,
            )
            if done.stdout.strip().endswith(str(nodes)):
                return
            time.sleep(1)
        raise TimeoutError(f"{nodes} nodes did not come up: {done.stderr[-500:]}")
