import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization import affine
from fleetpress.compression.quantization.affine import dequantize, quantization_parameters, quantize
from fleetpress.compression.scheme import QuantScheme, resolve

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def schemes(draw: st.DrawFn) -> QuantScheme:
    strategy = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = draw(st.integers(1, 20)) if strategy == "group" else None
    return QuantScheme(
        num_bits=draw(st.integers(2, 8)), symmetric=draw(st.booleans()), strategy=strategy, group_size=size
    )


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Rows of very different sizes, some of one sign, some zero."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    powers = torch.randint(-4, 4, (rows, 1), generator=generator)
    values = values * 10.0**powers
    values[:: draw(st.integers(2, 4))] = values[:: draw(st.integers(2, 4))][:1].abs()
    if draw(st.booleans()):
        values[-1] = 0
    return values.to(draw(st.sampled_from(DTYPES)))


def expanded(groups: torch.Tensor, weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """A value per weight from a value per group."""
    if scheme.group_size is None:
        return groups.expand(weight.shape)
    return groups.repeat_interleave(scheme.group_size, 1)[:, : weight.shape[1]]


@settings(deadline=None, max_examples=200)
@given(weights(), schemes())
def test_error_is_at_most_half_a_step(weight, scheme):
    scale, zero_point = quantization_parameters(weight, scheme)
    codes = quantize(weight, scale, zero_point, scheme)
    back = dequantize(codes, scale, zero_point, scheme)

    steps = (1 << scheme.num_bits) - 1
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= steps
    assert back.dtype == weight.dtype
    unit = torch.finfo(weight.dtype).eps / 2
    step = expanded(scale.double(), weight, scheme)
    # 0.5 is the method; the rest is the rounding of scales, of the arithmetic (float32) and of the result.
    bound = step * (0.5 + steps * (unit + 2.0**-22)) + weight.double().abs() * 2 * unit
    assert bool(((weight.double() - back.double()).abs() <= bound).all())


@settings(deadline=None, max_examples=50)
@given(weights(), schemes())
def test_zero_stays_zero(weight, scheme):
    weight = weight.clone()
    weight[:, 0] = 0
    scale, zero_point = quantization_parameters(weight, scheme)
    back = dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    assert bool((back[weight == 0] == 0).all())
    assert bool(back.isfinite().all())


def reference(weight: torch.Tensor, num_bits: int, group_size: int, *, symmetric: bool) -> torch.Tensor:
    """The textbook's loops."""
    back = torch.zeros_like(weight)
    for row, values in enumerate(weight):
        for start in range(0, len(values), group_size):
            group = values[start : start + group_size]
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            if symmetric:
                scale = max(-low, high) / ((2**num_bits - 1) / 2)
                zero = 2 ** (num_bits - 1)
            else:
                scale = (high - low) / (2**num_bits - 1)
                zero = round(-low / scale)
            for place, value in enumerate(group):
                code = min(max(round(float(value) / scale + zero), 0), 2**num_bits - 1)
                back[row, start + place] = (code - zero) * scale
    return back


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("num_bits", "group_size"), [(8, 50), (4, 16), (3, 7)])
def test_equal_to_the_textbook(num_bits, group_size, symmetric):
    weight = torch.randn(5, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheme = resolve(num_bits=num_bits, symmetric=symmetric, group_size=group_size)
    scale, zero_point = quantization_parameters(weight, scheme)
    back = dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    assert torch.allclose(
        back, reference(weight, num_bits, group_size, symmetric=symmetric), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    "scheme", [resolve("W4A16_ASYM", group_size=24), resolve(strategy="tensor", num_bits=5)]
)
def test_tiles_do_not_change_the_result(scheme, monkeypatch):
    weight = torch.randn(50, 100, generator=torch.Generator().manual_seed(2)).bfloat16()
    scale, zero_point = quantization_parameters(weight, scheme)
    codes = quantize(weight, scale, zero_point, scheme)
    back = dequantize(codes, scale, zero_point, scheme)
    monkeypatch.setattr(affine, "TILE_ELEMENTS", 300)
    again, zero_again = quantization_parameters(weight, scheme)
    assert torch.equal(scale, again)
    assert zero_point is zero_again is None or torch.equal(zero_point, zero_again)
    assert torch.equal(quantize(weight, scale, zero_point, scheme), codes)
    assert torch.equal(dequantize(codes, scale, zero_point, scheme), back)


def test_ties_go_to_the_even_code():
    scheme = resolve("W8A16")
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes = quantize(weight, torch.ones(1, 1), None, scheme)
    assert (codes.int() - 128).tolist() == [[0, 2, 2, 0, -2, -2]]


def test_tiny_float16_weights_keep_their_values():
    # A scale of 127.5ths of these would be 0 in float16; its smallest step holds them exactly.
    weight = (torch.arange(-8, 8, dtype=torch.float64) * 2.0**-24).half().view(1, 16)
    scheme = resolve("W8A16")
    scale, _ = quantization_parameters(weight, scheme)
    assert torch.equal(dequantize(quantize(weight, scale, None, scheme), scale, None, scheme), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "1 of 12 weights are NaN"),
        (float("inf"), "1 of 12 weights are infinite"),
        (float("-inf"), "1 of 12 weights are infinite"),
        (3e38, "overflow"),
    ],
)
def test_bad_values_are_named(value, words, symmetric):
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(QuantizationError, match=words):
        quantization_parameters(weight, resolve("W4A16", symmetric=symmetric))


def test_integer_weights_are_refused():
    with pytest.raises(QuantizationError, match="int64 cannot be quantized"):
        quantization_parameters(torch.ones(3, 4, dtype=torch.int64), resolve())
