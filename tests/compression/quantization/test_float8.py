"""FP8 codes and scales are those of compressed-tensors; where they are not, they are the better ones."""

import math

import pytest
import torch
from compressed_tensors.compressors import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, float8, quantize_weight
from fleetpress.compression.quantization.weight import encoded, parameters, predicted_bytes
from fleetpress.compression.scheme import SCHEMES, QuantScheme, resolve

CHANNEL, TENSOR = SCHEMES["FP8"], resolve("FP8", strategy="tensor")
METHOD = QUANTIZERS["round_to_nearest"]
STRATEGIES = pytest.mark.parametrize("scheme", [CHANNEL, TENSOR], ids=["channel", "tensor"])


def weights(dtype: torch.dtype, size: float = 0.02) -> Tensor:
    """Rows of different sizes, one of zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 96, generator=generator, dtype=torch.float64) * size
    values *= 2.0 ** torch.randint(-3, 3, (60, 1), generator=generator)
    values[3, :50], values[3, 50:] = 0.0, -0.0
    values[4, ::2] = -0.0
    return values.to(dtype)


def by_the_library(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    args = QuantizationArgs(num_bits=8, type="float", strategy=scheme.strategy, symmetric=True)
    per_row = scheme.strategy == "channel"
    low, high = (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)) if per_row else weight.aminmax()
    scale, _ = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale}
    packed = FloatQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    return packed["weight"], scale.view(-1, 1)


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


@STRATEGIES
@pytest.mark.parametrize("size", [1e3, 0.02, 1e-4, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_input_same_numbers(dtype: torch.dtype, size: float, scheme: QuantScheme) -> None:
    weight = weights(dtype, size)
    found = METHOD.quantize(weight, scheme)
    codes, scale = by_the_library(weight, scheme)
    assert torch.equal(bits(found.codes), bits(codes))
    assert torch.equal(found.scale, scale)
    assert found.scale.shape == scheme.groups(60, 96)
    assert found.zero_point is None


@STRATEGIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype, scheme: QuantScheme) -> None:
    """Under the same scales in float32 the library gives the same codes; in half precision it rounds twice."""
    weight = weights(dtype, 1.0)
    found = METHOD.quantize(weight, scheme)
    codes, scale = by_the_library(weight, scheme)
    assert torch.equal(found.scale, scale)
    args = QuantizationArgs(num_bits=8, type="float", strategy=scheme.strategy, symmetric=True)
    exact = FloatQuantizationCompressor.compress(
        {"weight": weight.float(), "weight_scale": scale.float()},
        QuantizationScheme(targets=["Linear"], weights=args),
    )
    assert torch.equal(bits(found.codes), bits(exact["weight"]))
    differ = bits(found.codes) != bits(codes)
    assert 0 < int(differ.sum()) < 0.05 * weight.numel()
    assert int((bits(found.codes).int() - bits(codes).int()).abs().max()) == 1
    theirs = float8.dequantize(codes, scale).double() - weight.double()
    mine = found.dequantize().double() - weight.double()
    assert float(mine.square().sum()) <= float(theirs.square().sum())


def test_tiny_float16_rows_are_not_cut_off() -> None:
    """Scales of float16 have few digits there: the library's cut off the largest weights, or hold none of them."""
    weight = weights(torch.float16, 1e-6)
    codes, scale = by_the_library(weight, CHANNEL)
    theirs = float8.dequantize(codes, scale).double() - weight.double()
    mine = METHOD.quantize(weight, CHANNEL).dequantize().double() - weight.double()
    assert float(mine.square().sum()) < 0.1 * float(theirs.square().sum())


@STRATEGIES
def test_a_tensor_may_come_in_blocks(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(torch.bfloat16)
    whole = METHOD.quantize(weight, scheme)
    monkeypatch.setattr(float8, "_TILE_ELEMENTS", 200)
    blocks = weight.split(7)
    if scheme is TENSOR:
        ends = torch.tensor([[weight.min(), weight.max()]])
        scale, zero_point = parameters(ends, scheme)
        parts = [encoded(block, scale, zero_point, scheme) for block in blocks]
    else:
        parts = [METHOD.quantize(block, scheme) for block in blocks]
    assert torch.equal(bits(torch.cat([part.codes for part in parts])), bits(whole.codes))
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**30), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(-8, 8)
)
def test_error_is_bounded(seed: int, dtype: torch.dtype, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(5, 33, generator=generator, dtype=torch.float64) ** 3 * 10.0**power).to(dtype)
    found = METHOD.quantize(weight, CHANNEL)
    exact, unit = weight.double().abs(), torch.finfo(dtype).eps
    bound = torch.maximum(exact / 16, found.scale.double() / 1024) + exact * unit
    assert bool(((found.dequantize().double() - weight.double()).abs() <= bound * (1 + 1e-6)).all())
    assert not bool(((bits(found.codes) & 0x7F) == 0x7F).any())


def test_codes_mean_what_torch_says() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = every[~every.float().isnan()].view(1, -1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        scale = torch.full((1, 1), 0.37, dtype=dtype)
        assert torch.equal(float8.dequantize(numbers, scale), numbers.to(dtype) * scale)
    with pytest.raises(QuantizationError, match="codes that mean NaN: the weight is damaged"):
        float8.dequantize(every.view(1, -1), torch.ones(1, 1))


def test_zeros_stay_zero_and_exact_values_exact() -> None:
    weight = torch.tensor([[448.0, -3.5, 2.0**-9, 0.0], [0.0, -0.0, 0.0, 0.0]])
    found = METHOD.quantize(weight, CHANNEL)
    assert found.scale.tolist() == [[1.0], [torch.finfo(torch.float32).eps]]
    assert torch.equal(found.dequantize(), weight)
    assert found.sqnr_db(weight) == math.inf
    assert 25 < METHOD.quantize(weights(torch.float32), CHANNEL).sqnr_db(weights(torch.float32)) < 35


@pytest.mark.parametrize(
    ("value", "words"),
    [(math.nan, "1 of 12 weights are NaN"), (-math.inf, "1 of 12 weights are infinite"), (3e38, "overflow")],
)
@STRATEGIES
def test_bad_values_are_named(value: float, words: str, scheme: QuantScheme) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(QuantizationError, match=words):
        METHOD.quantize(weight, scheme)
    with pytest.raises(QuantizationError, match="int64 cannot be quantized"):
        METHOD.quantize(torch.ones(3, 4, dtype=torch.int64), scheme)


def test_programs_hold_a_byte_a_code() -> None:
    found = quantize_weight("fc.weight", torch.ones(3, 4), 0, CHANNEL, METHOD)
    assert torch.equal(found.dequantize(), torch.ones(3, 4))
    assert found.stored_bytes() == predicted_bytes((3, 4), 0, CHANNEL, torch.float32) == 12 + 3 * 4
    with pytest.raises(MethodError, match="smallest_error makes integer codes or codebooks, not FP8"):
        quantize_weight("fc.weight", torch.ones(3, 4), 0, CHANNEL, QUANTIZERS["smallest_error"])


def test_ranges_are_not_narrowed() -> None:
    with pytest.raises(MethodError, match="smallest_error chooses ranges of integer codes"):
        QUANTIZERS["smallest_error"].quantize(torch.ones(3, 4), CHANNEL)
