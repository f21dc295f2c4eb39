"""Expected increases of the loss, against the increases themselves."""

import math

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.nn import functional

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.observing import calibrate
from fleetpress.compression.outputs import Meaning
from fleetpress.compression.quantization.weight import to_rows
from fleetpress.compression.sensitivity import divergence, expected_increase, output_errors

SAMPLES = 4000


def _net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    return net.eval(), torch.randn(SAMPLES, 2, 4, 4)


def _statistics(net: nn.Module, x: torch.Tensor, **options: object) -> dict[str, WeightStatistics]:
    program = export(net, (x[:2],), dynamic_shapes=({0: Dim("batch")},))
    return dict(calibrate(program, {"inputs": x}, 500, **options).weights)  # type: ignore[arg-type]


def test_output_errors_are_those_of_the_outputs() -> None:
    net, x = _net()
    x = x[:50]
    change = 0.1 * torch.randn_like(net[0].weight)  # type: ignore[index, arg-type]
    expected = functional.conv2d(x, change, groups=2).square().mean((0, 2, 3)).double()
    found = output_errors(to_rows(change, 0), _statistics(net, x)["0.weight"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["0", "3"])
def test_small_changes_cost_what_is_expected(name: str) -> None:
    """With targets drawn from the model itself the first-order term is zero, and the Fisher matrix the Hessian."""
    net, x = _net()
    statistics = _statistics(net, x, loss="distillation", seed=1)[f"{name}.weight"]
    weight = net.get_parameter(f"{name}.weight")
    change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = net(x).log_softmax(1)
        weight += change
        after = net(x).log_softmax(1)
    actual = float((before.exp() * (before - after)).sum(1).mean())  # what the cross entropy grows by
    expected = expected_increase(to_rows(change, 0), statistics, SAMPLES)
    assert expected == pytest.approx(actual, rel=0.5)


def test_statistics_without_gradients_price_nothing() -> None:
    net, x = _net()
    with pytest.raises(DataMismatchError, match="calibrate with a loss"):
        expected_increase(torch.zeros(4, 9), _statistics(net, x[:4])["0.weight"], 4)


@pytest.mark.parametrize("meaning", ["logits", "values", "probabilities"])
def test_masked_scores_do_not_diverge(meaning: Meaning) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(8, 3, generator=generator).softmax(-1) for _ in range(2))
    hole = torch.full((8, 1), 0.0 if meaning == "probabilities" else -torch.inf)
    masked = [torch.cat([value, hole], 1) for value in (before, after)]
    assert divergence(*masked, meaning) == pytest.approx(divergence(before, after, meaning))
    assert divergence(before, after, meaning) > 0


@pytest.mark.parametrize("meaning", ["logits", "values"])
def test_outputs_that_became_nan_are_infinitely_far(meaning: Meaning) -> None:
    before = torch.ones(4, 3)
    after = before.clone()
    after[2, 1] = torch.nan
    assert divergence(before, after, meaning) == math.inf
