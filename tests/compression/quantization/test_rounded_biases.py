"""Biases keep what their format says, and no more."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fleetpress.compression.errors import MethodError
from fleetpress.compression.quantization.rounded_biases import rounded


def _e4m3() -> NDArray[np.float64]:
    """Every finite number of the format, from its definition."""
    small = [k * 2.0**-9 for k in range(8)]
    large = [(1 + k / 8) * 2.0 ** (e - 7) for e in range(1, 16) for k in range(8)][:-1]  # the last one is NaN
    return np.array([sign * number for sign in (1, -1) for number in small + large])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_bfloat16_is_torchs(dtype: torch.dtype) -> None:
    bias = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = rounded(bias, "BF16")
    assert found.dtype == dtype
    assert torch.equal(found, bias.to(torch.bfloat16).to(dtype))


@pytest.mark.parametrize("size", [1e-30, 0.3, 7e4, 1e37])
def test_fp8_is_that_of_the_nearest_number_under_a_power_of_two(size: float) -> None:
    bias = torch.randn(4, 25, generator=torch.Generator().manual_seed(1)) * size
    found = rounded(bias, "FP8")
    power = 2.0 ** (7 - np.floor(np.log2(float(bias.abs().max()))))
    nearest = np.abs(bias.double().numpy()[..., None] * power - _e4m3()).min(-1)
    np.testing.assert_array_equal(np.abs(found.double().numpy() - bias.double().numpy()) * power, nearest)
    error, largest = (found - bias).abs(), float(bias.abs().max())
    assert (error <= (bias.abs() / 16).clamp(min=largest * 2.0**-17)).all()
    assert found.unique().numel() < bias.unique().numel()


def test_what_is_rounded_stays_as_it_is() -> None:
    bias = torch.randn(30, generator=torch.Generator().manual_seed(2))
    for form in ("BF16", "FP8"):
        once = rounded(bias, form)
        assert torch.equal(rounded(once, form), once)


def test_odd_values() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0])
    assert torch.equal(rounded(odd, "FP8").nan_to_num(7.0), odd.nan_to_num(7.0))
    assert torch.equal(rounded(torch.zeros(3), "FP8"), torch.zeros(3))
    assert rounded(torch.zeros(0), "FP8").shape == (0,)


def test_an_unknown_format_is_told() -> None:
    with pytest.raises(MethodError, match="biases: FP4 is unknown; give one of BF16, FP8"):
        rounded(torch.zeros(1), "FP4")
