"""A measured increase is the divergence of the outputs, over no more samples than are worth it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from fleetpress.compression.batches import Arrays, count
from fleetpress.compression.evaluation import Runner, all_outputs
from fleetpress.compression.meter import Meter
from fleetpress.compression.outputs import meaning
from fleetpress.compression.program import tensors
from fleetpress.compression.sensitivity import divergence


def _program(width: int) -> ExportedProgram:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width)).eval()
    return export(net, (torch.randn(2, width),), dynamic_shapes=({0: Dim("batch")},))


def test_it_is_the_divergence_of_few_samples_and_of_none_for_the_same_program() -> None:
    program, inputs = _program(4), {"inputs": torch.randn(48, 4)}
    meter, changed = Meter(program, inputs), {"0.bias": tensors(program)["0.bias"] + torch.arange(4.0)}
    assert meter.increase_of(program) == 0.0
    before = all_outputs(Runner(program), inputs)
    assert meter.increase(changed) == pytest.approx(
        divergence(before, before + torch.arange(4.0), meaning(program)), rel=1e-5
    )
    assert meter.increase({"0.bias": torch.full((4,), math.nan)}) == math.inf


@pytest.mark.parametrize(
    ("cost", "given", "measured"), [(1, 200, 64), (10**9, 200, 20), (10**12, 200, 8), (10**12, 3, 3)]
)
def test_costly_programs_are_measured_on_fewer_samples(
    monkeypatch: pytest.MonkeyPatch, cost: int, given: int, measured: int
) -> None:
    monkeypatch.setattr("fleetpress.compression.meter.sample_macs", lambda program, arrays: cost)
    program, seen = _program(4), []

    def outputs(runner: Runner, arrays: Arrays) -> Tensor:
        seen.append(count(arrays))
        return all_outputs(runner, arrays)

    monkeypatch.setattr("fleetpress.compression.meter.all_outputs", outputs)
    Meter(program, {"inputs": torch.randn(given, 4)}).increase_of(program)
    assert seen == [measured, measured]
