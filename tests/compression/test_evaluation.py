"""Evaluation gives the same number for any batch size, static batches included."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.errors import DataMismatchError, MethodError
from fleetpress.compression.evaluation import evaluate, smoke_inputs
from fleetpress.compression.outputs import meaning


class Fixed(nn.Module):
    """Works for four samples at a time only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of [4, 6]."""
        return self.linear(x.reshape(4, 6) * 1.0).reshape(4, 3)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def fixed() -> ExportedProgram:
    """A program for four samples."""
    torch.manual_seed(0)
    return torch.export.export(Fixed(), (torch.zeros(4, 6),))


def dynamic(program: ExportedProgram) -> ExportedProgram:
    """The same weights for any batch."""
    linear = nn.Linear(6, 3)
    linear.load_state_dict(
        {"weight": program.state_dict["linear.weight"], "bias": program.state_dict["linear.bias"]}
    )
    return torch.export.export(linear, (torch.zeros(4, 6),), dynamic_shapes=({0: Dim.DYNAMIC},))


ARRAYS = {
    "inputs": torch.randn(11, 6, generator=torch.Generator().manual_seed(0)),
    "targets": torch.arange(11) % 3,
}


def test_a_static_batch_is_filled_up_and_cut(fixed: ExportedProgram) -> None:
    program = dynamic(fixed)
    expected = evaluate(program, ARRAYS, "accuracy", batch_size=11)
    assert [evaluate(program, ARRAYS, "accuracy", batch_size=size) for size in (1, 3, 64)] == [expected] * 3
    assert [evaluate(fixed, ARRAYS, "accuracy", batch_size=size) for size in (1, 3, 64)] == [expected] * 3
    right = (program.module()(ARRAYS["inputs"]).argmax(1) == ARRAYS["targets"]).double().mean()
    assert expected == pytest.approx(float(right))


def test_a_program_agrees_with_itself_without_targets(fixed: ExportedProgram) -> None:
    inputs = {"inputs": ARRAYS["inputs"]}
    assert evaluate(fixed, inputs, "agreement", reference=dynamic(fixed)) == 1.0
    assert evaluate(fixed, inputs, "cosine", reference=dynamic(fixed), batch_size=5) == pytest.approx(1.0)


def test_a_metric_of_fidelity_needs_the_original(fixed: ExportedProgram) -> None:
    with pytest.raises(MethodError, match="give it as the reference"):
        evaluate(fixed, ARRAYS, "agreement")


def test_data_that_do_not_fit_are_told(fixed: ExportedProgram) -> None:
    with pytest.raises(DataMismatchError, match="there is no array 'targets'"):
        evaluate(fixed, {"inputs": ARRAYS["inputs"]}, "accuracy")


def test_evaluation_leaves_a_train_mode_program_alone() -> None:
    norm = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    program = torch.export.export(norm, (torch.zeros(4, 6),), dynamic_shapes=({0: Dim.DYNAMIC},))
    before = program.state_dict["1.running_mean"].clone()
    assert evaluate(program, ARRAYS, "accuracy") == evaluate(program, ARRAYS, "accuracy")
    assert torch.equal(program.state_dict["1.running_mean"], before)


def test_smoke_inputs_run(fixed: ExportedProgram) -> None:
    (inputs,) = smoke_inputs(fixed).values()
    assert fixed.module()(inputs).shape == (4, 3)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(6, 3), "logits"),
        (nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1)), "logits"),
        (nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), "probabilities"),
        (nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), "values"),
        (nn.Linear(6, 1), "values"),
        (nn.Sequential(nn.Linear(6, 3), nn.Tanh()), "values"),
    ],
    ids=["linear", "log_softmax", "softmax", "autoencoder", "one_number", "tanh"],
)
def test_what_outputs_are_taken_for(model: nn.Module, expected: str) -> None:
    assert meaning(torch.export.export(model, (torch.zeros(4, 6),))) == expected
