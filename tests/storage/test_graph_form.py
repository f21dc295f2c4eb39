"""Graphs have short forms that give every field back; what is none is refused in one way."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from fleetpress.storage.graph_form import long_form, short_form
from fleetpress.storage.programs import module_to_program, program_members_of


class Branches(nn.Module):
    """Two inputs, buffers of both kinds, a constant, an operator of several outputs, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lstm = nn.BatchNorm1d(4), nn.LSTM(4, 3, batch_first=True)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        found, _ = self.lstm(self.norm(a).unsqueeze(1) * self.scale)
        one, other = torch.cat([found[:, 0], b], -1).chunk(2, -1)
        return {"sum": one + other + torch.tensor([1.0, 2.0]), "mean": other.mean(-1)}


NETS: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
    "mlp": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (torch.zeros(2, 4),)),
    "branches": (Branches(), (torch.zeros(2, 4), torch.zeros(2, 1))),
    "attention": (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), (torch.zeros(2, 3, 8),)),
}


@pytest.fixture(scope="module", params=NETS)
def graph(request: pytest.FixtureRequest) -> Any:
    net, inputs = NETS[request.param]
    return program_members_of(module_to_program(net, inputs)).graph


def test_graphs_get_short_and_come_back(graph: Any) -> None:
    short = short_form(graph)
    assert isinstance(short, list)
    text = json.dumps(short, separators=(",", ":"))
    assert len(text) < len(json.dumps(graph)) / 5
    assert long_form(json.loads(text)) == graph


def test_a_field_that_is_not_known_keeps_the_graph_as_it_is(graph: Any) -> None:
    odd = copy.deepcopy(graph)
    odd["graph_module"]["graph"]["nodes"][0]["inputs"][0]["kind"] = 7
    assert short_form(odd) == odd
    assert long_form(odd) == odd


@pytest.mark.parametrize(
    "short",
    [
        [],
        [[], [], []],
        [[["x", [2]]], [["torch.ops.aten.relu.default", "self"]], [[0, 5, 0]]],
        [[["x", [2]]], [["torch.ops.aten.relu.default", "self"]], [[0, 0, 0]]],
        [[["x", [2]]], [["torch.ops.aten.relu.default", "self"]], [[-1, 1, 0]]],
        [[["x", [2]]], [["torch.ops.aten.relu.default", "self"]], [[True, 1, 0]]],
        [[["x", [2]]], [["torch.ops.aten.relu.default", "self"]], [[0, 1, 1, 0]]],
        [[["x", [-1]]], [], []],
        [[["x", [1] * 100]], [], []],
        [[["x", 0]], [], []],
        [[["x", [2], "q"]], [], []],
        [5, 5, 5],
    ],
)
def test_what_is_no_short_form_is_a_value_error(short: Any) -> None:
    with pytest.raises(ValueError, match="short form"):
        long_form(short)


def test_shapes_that_many_values_share_are_not_written_out_without_end() -> None:
    long = [["x", [10**15] * 60]]
    relu = [["torch.ops.aten.relu.default", "self"]]
    with pytest.raises(ValueError, match="short form"):
        long_form([long, relu, [[0, 1, 0]] * 30_000])
