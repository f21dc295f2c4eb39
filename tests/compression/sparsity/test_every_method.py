"""What every method that zeroes weights promises on programs; one that is added to the table is looked at here, too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.errors import MethodError, PruningError
from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.pruning import PRUNERS
from fleetpress.compression.sparsity import SPARSIFIERS
from fleetpress.compression.sparsity.zero_layers import ZeroedLayers, least_zeros, zero_layers
from fleetpress.compression.training import TrainOptions, collect, train

INPUTS = torch.randn(24, 4, 6, generator=torch.Generator().manual_seed(1))
EXAMPLES = {"sparsity": 0.6, "pattern": "2:4"}


class Net(nn.Module):
    """A convolution with groups, a recurrent layer, a product whose units are columns, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 2, groups=2)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.mix = nn.Parameter(torch.randn(8, 12))
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.out(torch.tanh(self.gru(x.transpose(1, 2))[0][:, -1] @ self.mix))


def made() -> ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (INPUTS,), dynamic_shapes=({0: Dim.DYNAMIC},))


PROGRAM = made()
LAYERS = layers(PROGRAM)
STATISTICS = calibrate(PROGRAM, {"inputs": INPUTS}, 8).weights
GRADIENTS = collect(
    PROGRAM,
    {"inputs": INPUTS, "targets": torch.arange(24) % 3},
    8,
    loss="cross_entropy",
    seed=0,
    weights=True,
).moments()


@pytest.fixture(params=[(name, key) for name, entry in sorted(SPARSIFIERS.items()) for key in entry.takes])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A method with one way to say how much."""
    name, key = request.param
    return {"method": name, key: EXAMPLES[key]}


def zeroed(options: dict[str, Any], **others: Any) -> ZeroedLayers:
    return zero_layers(LAYERS, tensors(PROGRAM), {**options, **others}, STATISTICS, GRADIENTS)


def rows_of(name: str, weight: Tensor) -> Tensor:
    return weight.detach().T if name == "mix" else weight.detach().flatten(1)


def test_names_are_those_of_one_method() -> None:
    assert not SPARSIFIERS.keys() & PRUNERS.keys()
    for name, method in SPARSIFIERS.items():
        assert method.name == name
        assert method.summary
        assert method.paper
        assert (method.start is None) == (method.passes is None)
        assert [method.start is not None, method.needs_inputs, method.needs_gradients].count(True) == 1


def test_as_many_weights_go_as_the_plan_says(options: dict[str, Any]) -> None:
    result = zeroed(options)
    planned, reasons = least_zeros(LAYERS, tensors(PROGRAM), options)
    assert reasons == result.skipped == {}
    for name, weight in result.weights.items():
        gone, share = int((~weight.kept).sum()), 0.5 if "pattern" in options else 0.6
        assert planned[name] <= gone <= share * weight.kept.numel()
        if not SPARSIFIERS[options["method"]].needs_inputs:  # which count group by group, or block by block
            assert gone == planned[name] == int(share * weight.kept.numel())
    assert sorted(planned) == ["conv.weight", "gru.weight_hh_l0", "gru.weight_ih_l0", "mix", "out.weight"]
    for name, weight in result.weights.items():
        if "pattern" in options:
            assert ((rows_of(name, weight.values).reshape(-1, 4) != 0).sum(1) == 2).all()


def test_weights_that_stay_are_as_they_were_unless_the_method_moves_them(options: dict[str, Any]) -> None:
    before = {name: value.clone() for name, value in tensors(PROGRAM).items()}
    result = zeroed(options)
    assert all(torch.equal(value, before[name]) for name, value in tensors(PROGRAM).items())
    for name, weight in result.weights.items():
        assert weight.values.shape == before[name].shape
        assert weight.values.dtype == before[name].dtype
        assert weight.values.isfinite().all()
        if not SPARSIFIERS[weight.method].moves_weights:
            assert torch.equal(weight.values[weight.kept], before[name].detach()[weight.kept])


def test_the_same_input_gives_the_same_bits(options: dict[str, Any]) -> None:
    one, other = zeroed(options), zeroed(options)
    assert all(torch.equal(weight.values, other.weights[name].values) for name, weight in one.weights.items())


def test_what_cannot_be_observed_is_zeroed_by_magnitude_and_says_so(options: dict[str, Any]) -> None:
    some, known = (
        {name: seen for name, seen in found.items() if not name.startswith("gru.")}
        for found in (STATISTICS, GRADIENTS)
    )
    result = zero_layers(LAYERS, tensors(PROGRAM), options, some, known)
    instead = "magnitude_n_m" if "pattern" in options else "magnitude_unstructured"
    for name, weight in result.weights.items():
        unseen = SPARSIFIERS[options["method"]].start is None and name.startswith("gru.")
        assert weight.method == (instead if unseen else options["method"])
        assert weight.kind == {"c": "Conv1d", "g": "GRU"}.get(name[0], "Linear")


def test_the_program_runs_and_zeros_stay_zero_in_training(options: dict[str, Any]) -> None:
    weights = zeroed(options).weights
    program = with_tensors(PROGRAM, {name: weight.values for name, weight in weights.items()})
    assert program.module()(INPUTS[:3]).isfinite().all()
    masks = {name: weight.kept for name, weight in weights.items()}
    data = {"inputs": INPUTS, "targets": torch.arange(24) % 3}
    tuned = train(
        program,
        data,
        TrainOptions(epochs=1, batch_size=8, lr=0.1, weight_decay=0.1),
        loss="cross_entropy",
        seed=0,
        masks=masks,
    )
    for name, mask in masks.items():
        assert (tuned.values[name][~mask] == 0).all()
        assert (tuned.values[name][mask] != weights[name].values[mask]).any()


def test_one_threshold_over_all_weights(options: dict[str, Any]) -> None:
    method = SPARSIFIERS[options["method"]]
    if not method.compares_tensors or "pattern" in options:
        with pytest.raises(MethodError, match="scope global has no meaning for"):
            zeroed(options, scope="global")
        return
    result = zeroed(options, scope="global").weights
    score = method.score or (lambda weight, gradients: weight.abs())
    before = torch.cat([score(tensors(PROGRAM)[name].detach(), GRADIENTS[name]).flatten() for name in result])
    kept = torch.cat([weight.kept.flatten() for weight in result.values()])
    assert int((~kept).sum()) == int(0.6 * before.numel())
    assert before[~kept].max() <= before[kept].min()
    shares = [float(weight.kept.float().mean()) for weight in result.values()]
    assert max(shares) - min(shares) > 0.2


def test_groups_that_do_not_divide_a_row_are_told(options: dict[str, Any]) -> None:
    if "pattern" not in options:
        return
    result = zeroed(options, pattern="2:3")
    assert result.skipped == {
        "conv": "rows of 4 do not divide into groups of 3 (pattern 2:3)",
        "gru": "gru.weight_ih_l0: rows of 8 do not divide into groups of 3 (pattern 2:3)",
        "mix": "rows of 8 do not divide into groups of 3 (pattern 2:3)",
    }
    assert list(result.weights) == ["out.weight"]
    with pytest.raises(PruningError, match=r"no weight can be zeroed: conv: rows of 4 do not divide"):
        zeroed(options, pattern="1:32")


def test_a_share_of_less_than_one_weight_is_an_error(options: dict[str, Any]) -> None:
    if "sparsity" in options:
        with pytest.raises(PruningError, match="sparsity 1e-06 is too small to zero any weight; raise it"):
            zeroed(options, sparsity=1e-6)


def test_amounts_that_are_none(options: dict[str, Any]) -> None:
    for wrong in ({}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 1.0}, {"pattern": "4:4"}):
        with pytest.raises(MethodError):
            zero_layers(
                LAYERS, tensors(PROGRAM), {"method": options["method"], **wrong}, STATISTICS, GRADIENTS
            )
