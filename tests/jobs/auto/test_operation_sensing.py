"""Measured prices of narrower layers."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from fleetpress.compression.cost import macs
from fleetpress.compression.meter import Meter
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.jobs.auto.operation_sensing import sense_operations


def _sensed(net: nn.Module, index: int = 0, count: int = 1) -> tuple[ExportedProgram, dict[str, Any]]:
    """A net of four inputs with other weights, and what a task of so many senses of it."""
    torch.manual_seed(0)
    for value in net.parameters():
        nn.init.normal_(value)
    inputs = torch.randn(64, 4)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net.eval(), (inputs[:2],), dynamic_shapes=({0: batch},))
    known = calibrate(program, {"inputs": inputs}, 32, loss="distillation", seed=0)
    meter = Meter(program, {"inputs": inputs})
    return program, sense_operations(program, tensors(program), known, meter, index=index, count=count)


def test_the_width_below_which_nothing_makes_up_for_units_is_seen() -> None:
    """Twenty units between four inputs and two outputs: two of them will do, and one will not."""
    program, found = _sensed(nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 2)))
    ((name, narrowings),) = found["narrowings"].items()
    assert name == "0"
    increases = {round(20 * one["share"]): one["increase"] for one in narrowings}
    assert increases[0] == 0.0
    assert max(increases[count] for count in (6, 12, 15)) < 0.05 * increases[19]
    assert sorted(increases.values()) == [increases[count] for count in sorted(increases)]
    assert sum(one["macs"] for one in found["operations"]) == pytest.approx(macs(program))


def test_tasks_share_the_groups_of_units_and_find_the_same() -> None:
    """Every group is looked at once, and operations are told once."""

    def net() -> nn.Module:
        parts = (nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 6), nn.Linear(6, 2))
        return nn.Sequential(*parts)

    _, whole = _sensed(net())
    (_, first), (_, second) = (_sensed(net(), index, 2) for index in range(2))
    assert [len(some["narrowings"]) for some in (first, second)] == [2, 1]
    assert first["narrowings"] | second["narrowings"] == whole["narrowings"]
    assert [first["operations"], second["operations"]] == [whole["operations"], []]
