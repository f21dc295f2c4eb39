"""Operations that go with units are those that are gone once the units are."""

import itertools

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from fleetpress.compression.cost import layer_macs, macs
from fleetpress.compression.joint_allocation import LayerChoice
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import delete, find_units, removed_with
from fleetpress.compression.unit_operations import operations_of

_STRUCTURE = ("channel", "head", "recurrent")


class _Attending(nn.Module):
    """Heads that are deleted with their products of queries, keys and values, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [layer(x).view(-1, 6, 4, 4).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(-1, 6, 16)
        x = x + self.out(mixed)
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class _Recurring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def _convolving() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(192, 4)
    )


def _program(net: nn.Module, *shape: int) -> ExportedProgram:
    return torch.export.export(net.eval(), (torch.zeros(shape),))


@pytest.mark.parametrize(
    ("program", "groups"),
    [
        (_program(_convolving(), 1, 1, 8, 8), 2),
        (_program(_Attending(), 1, 6, 16), 2),
        (_program(_Recurring(), 1, 6, 5), 1),
    ],
    ids=["convolutions", "attention", "recurrent"],
)
def test_what_is_left_is_what_the_smaller_program_does(program: ExportedProgram, groups: int) -> None:
    units = find_units(program, structure=_STRUCTURE)
    assert len(units.groups) == groups
    found = operations_of(program, units, tensors(program), _STRUCTURE)
    assert sum(one.macs for one in found) == pytest.approx(macs(program))
    for shares in itertools.product((0.25, 0.5), repeat=groups):
        chosen = dict(zip([group.name for group in units.groups], shares, strict=True))
        classes = [group.classes[: int(chosen[group.name] * group.count)] for group in units.groups]
        smaller = program
        gone: dict[str, tuple[int, ...]] = {}
        for some in classes:
            gone |= removed_with(units, some)
        smaller = delete(program, gone, _STRUCTURE)
        expected = sum(one.macs * LayerChoice(options=(), parts=one.parts).left(chosen) for one in found)
        assert expected == pytest.approx(macs(smaller), rel=1e-6)


def test_layers_have_all_operations_but_those_of_products_without_weights() -> None:
    program = _program(_Attending(), 1, 6, 16)
    own = layer_macs(program)
    assert own["up"] == 6 * 16 * 24
    assert sum(own.values()) + 2 * 6 * 6 * 16 == macs(program)
