"""What compensation promises: exact where it can be, the best fit where it cannot, a reason where it does nothing."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from fleetpress.compression.errors import MethodError
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import delete
from fleetpress.compression.pruning.compensate import Compensation, compensate, with_compensation

INPUTS = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(30, 2, 7, 7, generator=torch.Generator().manual_seed(3))
GONE = {"0": (1, 3, 4)}


def perceptron(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4, bias=bias)).eval()


def convolutional(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, **options)).eval()  # type: ignore[arg-type]


def program_of(model: nn.Module, inputs: Tensor) -> ExportedProgram:
    return export(model, (inputs[:2],), dynamic_shapes=({0: Dim.AUTO},))


def found(
    program: ExportedProgram, inputs: Tensor, how: str, gone: dict[str, tuple[int, ...]]
) -> Compensation:
    observed = calibrate(program, {"inputs": inputs}, 20)
    return compensate(program, gone, {name: item.inputs for name, item in observed.weights.items()}, how)


def outputs(
    model: nn.Module, inputs: Tensor, how: str, gone: dict[str, tuple[int, ...]] | None = None
) -> Tensor:
    """Of the smaller program, compensated or not."""
    gone = GONE if gone is None else gone
    program = program_of(model, inputs)
    if how != "none":
        program = with_compensation(program, found(program, inputs, how, gone).values)
    with torch.no_grad():
        result: Tensor = delete(program, gone).module()(inputs)
    return result


def error(got: Tensor, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((got - model(inputs)).square().mean())


@pytest.mark.parametrize("how", ["bias", "least_squares"])
def test_units_that_never_change_are_made_up_for_exactly(how: str) -> None:
    model = perceptron()
    with torch.no_grad():
        model[0].weight[list(GONE["0"])] = 0
        model[0].bias[list(GONE["0"])] = torch.tensor([0.5, 1.0, 2.0])
    assert error(outputs(model, INPUTS, "none"), model, INPUTS) > 0.01
    assert error(outputs(model, INPUTS, how), model, INPUTS) < 1e-10


def test_the_mean_output_stays_what_it_was() -> None:
    for model, inputs in (
        (perceptron(), INPUTS),
        (perceptron(bias=False), INPUTS),
        (convolutional(), IMAGES),
    ):
        got = outputs(model, inputs, "bias")
        with torch.no_grad():
            wanted = model(inputs)
        dims = [0, *range(2, wanted.dim())]
        torch.testing.assert_close(got.mean(dims), wanted.mean(dims), rtol=1e-4, atol=1e-5)


def test_a_bias_is_made_where_there_is_none() -> None:
    for model, inputs in ((perceptron(bias=False), INPUTS), (convolutional(bias=False), IMAGES)):
        program = program_of(model, inputs)
        values = found(program, inputs, "bias", GONE).values
        assert list(values) == ["2.bias"]
        mended = with_compensation(program, values)
        assert "2.bias" in mended.graph_signature.parameters
        assert torch.equal(tensors(mended)["2.bias"], values["2.bias"])
        assert tensors(program).keys() == {"0.weight", "0.bias", "2.weight"}, (
            "the program itself stays as it is"
        )


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_is_the_regression_of_the_outputs_on_the_inputs_that_stay(bias: bool) -> None:
    model = perceptron(bias=bias)
    with torch.no_grad():
        hidden, wanted = model[:2](INPUTS).double(), model(INPUTS).double()
    kept = hidden[:, [0, 2, 5, 6, 7]]
    columns = torch.cat([kept, torch.ones(len(kept), 1)], 1) if bias else kept
    best = columns @ torch.linalg.lstsq(columns, wanted).solution
    least = float((best - wanted).square().mean())
    got = error(outputs(model, INPUTS, "least_squares"), model, INPUTS)
    assert least <= got < 1.1 * least  # the damping costs a little
    assert got < 0.8 * error(outputs(model, INPUTS, "none"), model, INPUTS)


def test_a_unit_that_is_a_mixture_of_others_is_not_missed() -> None:
    model = convolutional()
    with torch.no_grad():
        for part in (model[0].weight, model[0].bias):
            part[1], part[3], part[4] = 2 * part[0], 0.5 * part[2], 3 * part[5]
    before = error(outputs(model, IMAGES, "none"), model, IMAGES)
    assert error(outputs(model, IMAGES, "least_squares"), model, IMAGES) < 1e-3 * before


def test_groups_are_fitted_each_to_its_own_inputs() -> None:
    model = convolutional(groups=2)
    gone = {"0": (1, 5)}  # the same place of both groups
    errors = {
        how: error(outputs(model, IMAGES, how, gone), model, IMAGES)
        for how in ("none", "bias", "least_squares")
    }
    assert errors["least_squares"] < errors["bias"] < errors["none"]


def test_flattened_channels_are_found_in_the_layer_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    assert error(outputs(model, IMAGES, "bias", {"0": (2,)}), model, IMAGES) < 1e-10


class Tied(nn.Module):
    """Layers that nothing can be done for: a tied weight, and one that reads a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(4, 5)
        self.two.weight = self.one.weight
        self.before, self.memory = nn.Linear(5, 6), nn.LSTM(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        sequence, _ = self.memory(torch.relu(self.before(x)).unsqueeze(1))
        return self.one(hidden) + self.two(hidden) + sequence.sum((1, 2))[:, None]  # type: ignore[no-any-return]


def test_what_cannot_be_made_up_for_says_why() -> None:
    torch.manual_seed(0)
    program = program_of(Tied().eval(), INPUTS)
    result = found(program, INPUTS, "bias", {"first": (0,), "before": (2,)})
    assert not result.values
    assert result.skipped["two"] == "its weight is tied to another layer's"  # both use the last one's name
    assert result.skipped["memory"] == "what a LSTM layer reads is not known"
    with pytest.raises(MethodError, match="it is none, bias, least_squares"):
        compensate(program, {"first": (0,)}, {}, "mean")


def test_an_input_that_never_varies_leaves_the_weights_alone() -> None:
    model = perceptron()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.linspace(0.1, 1, 8))
    assert error(outputs(model, INPUTS, "least_squares"), model, INPUTS) < 1e-10


class Products(nn.Module):
    """A product with a matrix that can take no bias, and a weight that is used with two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.columns = nn.Linear(5, 6), nn.Parameter(torch.randn(6, 3))
        self.second, self.rows = nn.Linear(5, 6), nn.Parameter(torch.randn(3, 6))
        self.one, self.two = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.second(x))
        both = nn.functional.linear(hidden, self.rows, self.one) * nn.functional.linear(
            hidden, self.rows, self.two
        )
        return torch.relu(self.first(x)) @ self.columns + both  # type: ignore[no-any-return]


def test_operators_that_take_no_bias_or_another_one_say_so() -> None:
    torch.manual_seed(0)
    program = program_of(Products().eval(), INPUTS)
    gone = {"first": (0, 3), "second": (1,)}
    result = found(program, INPUTS, "bias", gone)
    assert result.skipped == {
        "columns": "its operator takes no bias",
        "rows": "its weight is used with several biases",
    }
    fitted = found(program, INPUTS, "least_squares", gone)
    assert list(fitted.corrected) == ["columns"]
    assert fitted.values["columns"].shape == (6, 3)
    assert not fitted.values["columns"][[0, 3]].any(), "columns of what is gone"
