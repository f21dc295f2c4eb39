"""The Ray executor on two nodes, one of which dies while it works: in a process of its own, with its own cluster."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, time
from ray.cluster_utils import Cluster
from fleetpress.jobs.executors import open_executor
from fleetpress.jobs.tasks import Failure, StepResult, Task, TaskRecord

def step(task):
    import ray
    if task.payload.get("long"):
        open(task.payload["long"], "w").close()
        time.sleep(60)
    return StepResult(result={"node": ray.get_runtime_context().get_node_id()})

def task(name, **payload):
    return Task(id=name, model="m", kind="quantize", digest=name, payload=payload)

def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
node = cluster.add_node(num_cpus=2)
executor = open_executor("ray", step, sys.argv[1], address=cluster.address)
assert executor.slots == 2, executor.slots
executor.submit(task("first"))
[(_, record)] = executor.wait(60)
assert isinstance(record, TaskRecord) and record.result["node"] == node.node_id, record
mark = sys.argv[1] + "/mark"
executor.submit(task("again", long=mark))
wait_until(lambda: os.path.exists(mark))
cluster.remove_node(node, allow_graceful=False)
[(_, failure)] = executor.wait(30)
assert isinstance(failure, Failure) and failure.error_class == "transient", failure
print(failure.reason)
other = cluster.add_node(num_cpus=1)
wait_until(lambda: executor.slots == 1)
executor.submit(task("again"))
[(_, record)] = executor.wait(60)
assert record.attempts == 2 and record.result["node"] == other.node_id, record
executor.close()
"""


def test_a_node_that_dies_costs_one_attempt(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "its node died" in result.stdout
