"""The first day with a cluster that is too small."""

from pathlib import Path
from typing import Any


def test_a_task_larger_than_every_machine(newcomer: Any, ray_cluster: None) -> None:
    outcome = newcomer.cli("run", newcomer.wrote(resources={"memory_per_task": "4TiB"}))
    newcomer.check(
        outcome, 4, "4096.0 GiB of memory each, which the cluster can never give", "lower resources.memory"
    )
    assert not Path("out/models").exists()
