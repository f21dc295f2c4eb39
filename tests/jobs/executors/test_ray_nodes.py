"""The Ray executor on two nodes, one of which dies while it works: in a process of its own, with its own cluster."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import os, sys, time
import ray
from ray.cluster_utils import Cluster
from fleetpress.jobs.executors import open_executor
from fleetpress.jobs.tasks import Failure, Task

def step(task):
    open(task.payload["mark"], "w").close()
    time.sleep(60)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
node = cluster.add_node(num_cpus=2)
executor = open_executor("ray", step, sys.argv[1], address=cluster.address)
assert executor.slots == 2, executor.slots
mark = sys.argv[1] + "/mark"
executor.submit(Task(id="a", model="m", kind="quantize", digest="a", payload={"mark": mark}))
deadline = time.monotonic() + 60
while not os.path.exists(mark):
    assert time.monotonic() < deadline
    time.sleep(0.05)
cluster.remove_node(node, allow_graceful=False)
[(_, failure)] = executor.wait(30)
assert isinstance(failure, Failure) and failure.error_class == "lost", failure
print(failure.reason)
executor.close()
assert ray.is_initialized()  # a cluster that was there before stays
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_dies_loses_its_task(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short enough for the paths of Ray's sockets
        # In the usual folder, the cluster would leave its address for every later `ray.init()` of this machine.
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**os.environ, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    assert "its node died" in result.stdout
