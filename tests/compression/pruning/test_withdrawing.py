"""Compensation stays where the outputs are nearer with it, and is taken back where it harms."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from fleetpress.compression.meter import Meter
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import delete
from fleetpress.compression.pruning.compensate import Compensation, compensate, with_compensation
from fleetpress.compression.pruning.withdrawing import WITHDRAWN, withdraw

INPUTS = torch.randn(200, 5, generator=torch.Generator().manual_seed(2))
GONE = {"0": (1, 3), "2": (0, 4)}


def program_of(model: nn.Module, inputs: Tensor) -> ExportedProgram:
    return export(model.eval(), (inputs[:2],), dynamic_shapes=({0: Dim.AUTO},))


@pytest.fixture
def program() -> ExportedProgram:
    torch.manual_seed(0)
    parts = (nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    return program_of(nn.Sequential(*parts), INPUTS)


def compensated(
    program: ExportedProgram, inputs: Tensor, gone: dict[str, tuple[int, ...]], how: str
) -> Compensation:
    observed = calibrate(program, {"inputs": inputs}, 50).weights
    return compensate(program, gone, {name: item.inputs for name, item in observed.items()}, how)


class Saturated(nn.Module):
    """Its fourth hidden unit is far larger than all others, for one input in twenty, where the output is 1 anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(2, 4), nn.Linear(4, 1)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [1, 0.4], [0, 40]]))
            self.hidden.bias.copy_(torch.tensor([0.0, 0, 0, -200]))
            self.head.weight.copy_(torch.tensor([[0.3, -0.3, 0.5, 1]]))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x))).clamp(-1, 1)  # type: ignore[no-any-return]


def test_a_fit_to_large_numbers_that_the_outputs_do_not_depend_on_is_taken_back() -> None:
    rare = 10.0 * (torch.arange(200) % 20 == 0)
    inputs = torch.stack([0.5 * INPUTS[:, 0], rare], 1)
    program, gone = program_of(Saturated(), inputs), {"hidden": (3,)}
    meter = Meter(program, {"inputs": inputs})
    for how in ("bias", "least_squares"):
        found = compensated(program, inputs, gone, how)
        assert list(found.corrected) == ["head"]
        harmed = meter.increase_of(delete(with_compensation(program, found.values), gone))
        assert harmed > 10 * meter.increase_of(delete(program, gone))
        left = withdraw(program, gone, found, meter.increase_of)
        assert (left.values, left.skipped) == ({}, {"head": WITHDRAWN})


@pytest.mark.parametrize("how", ["bias", "least_squares"])
def test_only_what_harms_goes_back(program: ExportedProgram, how: str) -> None:
    meter = Meter(program, {"inputs": INPUTS})
    found = compensated(program, INPUTS, GONE, how)
    assert list(found.corrected) == ["2", "4"]
    noise = torch.Generator().manual_seed(1)
    spoilt = {
        name: value + torch.randn(value.shape, generator=noise)
        for name, value in found.corrected["4"].items()
    }
    left = withdraw(
        program,
        GONE,
        Compensation(corrected={"2": found.corrected["2"], "4": spoilt}, skipped={}),
        meter.increase_of,
    )
    assert left.skipped.get("4") == WITHDRAWN
    assert "4.weight" not in left.values
    assert "4.bias" not in left.values, "a bias that the layer did not have"


def test_what_helps_stays_and_every_layer_is_measured_once(program: ExportedProgram) -> None:
    meter, asked = Meter(program, {"inputs": INPUTS}), []

    def increase(smaller: ExportedProgram) -> float:
        asked.append(tensors(smaller)["4.weight"].shape)
        return meter.increase_of(smaller)

    found = compensated(program, INPUTS, GONE, "least_squares")
    left = withdraw(program, GONE, found, increase)
    assert asked == [(4, 6)] * 3, "of the smaller program, and once for each of two layers"
    assert left.corrected.keys() == {"2", "4"}
    assert all(torch.equal(left.values[name], value) for name, value in found.values.items())


def test_without_compensation_nothing_is_measured(program: ExportedProgram) -> None:
    none = Compensation(corrected={}, skipped={"2": "a reason"})
    assert withdraw(program, GONE, none, lambda smaller: pytest.fail("measured")) is none
