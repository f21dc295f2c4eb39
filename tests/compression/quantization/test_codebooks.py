"""NF4, MXFP4, ternary and binary codes: what their papers and other libraries say they are."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward_helpers import _quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, codebooks, quantize_weight
from fleetpress.compression.quantization.packing import pack
from fleetpress.compression.quantization.trits import pack_trits
from fleetpress.compression.scheme import SCHEMES, resolve

FIXED = ("NF4", "MXFP4", "TERNARY", "BINARY")
NEAREST, SMALLEST = QUANTIZERS["round_to_nearest"], QUANTIZERS["smallest_error"]
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "formats.json").read_text())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_golden_bytes() -> None:
    """Those of MXFP4 were made by torchao: ties, signs of zero, values beyond 6, a group of zeros."""
    weight = torch.from_numpy(np.frombuffer(bytes.fromhex(GOLDEN["weight"]), "<f4").reshape(2, 64).copy())
    for name in (*FIXED, "FP8"):
        golden, found = GOLDEN[name.lower()], quantize_weight("w", weight, 0, SCHEMES[name], NEAREST)
        bits = SCHEMES[name].num_bits
        stream = pack_trits(found.codes) if name == "TERNARY" else pack(found.codes.view(torch.uint8), bits)
        assert bytes(stream.tolist()).hex() == golden["stream"], name
        assert found.scale.numpy().tobytes().hex() == golden["scale"], name


def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E, as its authors compute them: eight of either side, and zero."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    quantiles = np.sort(np.concatenate([above, [0.0], below]))
    found = codebooks.entries(SCHEMES["NF4"], torch.float32)
    assert found.numpy() == pytest.approx(quantiles / quantiles.max(), abs=5e-7)


def test_e2m1_codes_are_those_of_compressed_tensors() -> None:
    weight = normal(8, 64).mul_(2)
    found = quantize_weight("w", weight, 0, SCHEMES["MXFP4"], NEAREST)
    args = QuantizationArgs(num_bits=4, type="float", strategy=QuantizationStrategy.GROUP, group_size=32)
    factor = codebooks.factors(found.scale, torch.float32)
    theirs = _quantize(
        x=(weight.view(8, 2, 32)),
        scale=factor.unsqueeze(-1),
        zero_point=None,
        q_min=torch.tensor(-6.0),
        q_max=torch.tensor(6.0),
        args=args,
    )
    assert torch.equal(found.dequantize().view(8, 2, 32), theirs * factor.unsqueeze(-1))


def test_mx_exponents_are_those_of_the_specification() -> None:
    biggest = torch.tensor([1.0, 1.99, 2.0, 6.0, 7.99, 8.0, 1e-30, 2.0**-126, 2.0**-140, 0.0])
    weight = torch.zeros(10, 32)
    weight[:, 5] = biggest
    found = quantize_weight("w", weight, 0, SCHEMES["MXFP4"], NEAREST)
    expected = [max(-127, math.floor(math.log2(float(value))) - 2) if value else -127 for value in biggest]
    assert [int(code) - 127 for code in found.scale.flatten()] == expected
    assert found.scale.dtype == torch.uint8
    assert found.dequantize()[:3, 5].tolist() == [1.0, 1.5, 2.0]  # 7.96 becomes 6


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.sampled_from(FIXED), st.sampled_from(["round_to_nearest", "smallest_error"])),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(1, 70),
    st.integers(-12, 3),
    st.integers(0, 99),
)
def test_errors_are_bounded_by_half_the_way_between_entries(
    way: tuple[str, str], dtype: torch.dtype, columns: int, power: int, seed: int
) -> None:
    name, method = way
    weight = (normal(3, columns, seed=seed) * 2.0**power).to(dtype)
    found = quantize_weight("w", weight, 0, SCHEMES[name], QUANTIZERS[method])
    assert found.dtype == dtype
    factor = codebooks.factors(found.scale, dtype).repeat_interleave(
        codebooks.group_counts(weight, SCHEMES[name]), dim=1
    )
    entries = codebooks.entries(SCHEMES[name], dtype).double()
    possible = entries * factor.double()[..., None]
    nearest = (possible - weight.double()[..., None]).abs().amin(-1)
    error = (found.dequantize().double() - weight.double()).abs()
    slack = weight.abs().double() * 2 * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert bool((error <= nearest + slack + factor.double() * 1e-6).all())
    if method == "smallest_error":
        usual = quantize_weight("w", weight, 0, SCHEMES[name], NEAREST)
        assert float(error.square().sum()) <= float(
            (usual.dequantize().double() - weight.double()).square().sum()
        )


def test_zeros_stay_zeros_except_in_binary() -> None:
    weight = normal(4, 128)
    weight[0] = 0
    weight[1, ::3] = 0
    for name in ("NF4", "MXFP4", "TERNARY"):
        back = quantize_weight("w", weight, 0, SCHEMES[name], SMALLEST).dequantize()
        assert bool((back[weight == 0] == 0).all())
    back = quantize_weight("w", weight, 0, SCHEMES["BINARY"], SMALLEST).dequantize()
    assert bool((back[0] == 0).all())
    assert bool((back[1, ::3] > 0).all())


def test_binary_is_the_sign_times_the_mean_magnitude() -> None:
    weight = normal(5, 33)
    expected = torch.where(weight >= 0, 1, -1) * weight.abs().mean(1, keepdim=True)
    back = quantize_weight("w", weight, 0, SCHEMES["BINARY"], NEAREST).dequantize()
    assert torch.allclose(back, expected, rtol=1e-6)


def test_ternary_scales_are_those_of_the_paper_and_the_optimum() -> None:
    weight = normal(4, 11)
    usual = quantize_weight("w", weight, 0, SCHEMES["TERNARY"], NEAREST)
    best = quantize_weight("w", weight, 0, SCHEMES["TERNARY"], SMALLEST)
    for row, scale, optimum in zip(weight, usual.scale, best.dequantize(), strict=True):
        magnitudes = row.abs()
        large = magnitudes[magnitudes > 0.7 * magnitudes.mean()]
        assert float(scale) == pytest.approx(float(large.mean()), rel=1e-6)
        ordered = magnitudes.sort(descending=True).values.double()
        least = min(
            float((ordered[:kept] - ordered[:kept].mean()).square().sum() + ordered[kept:].square().sum())
            for kept in range(1, 12)
        )
        assert float((optimum - row).double().square().sum()) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("name", FIXED[:1] + FIXED[2:])
def test_one_scale_for_the_tensor_is_that_of_one_long_row(name: str) -> None:
    weight = normal(6, 20)
    for method in (NEAREST, SMALLEST):
        whole = quantize_weight("w", weight, 0, resolve(name, strategy="tensor"), method)
        row = quantize_weight("w", weight.view(1, 120), 0, resolve(name, group_size=None), method)
        assert torch.equal(whole.dequantize(), row.dequantize().view(6, 20))


def test_the_ratio_of_signal_to_noise_is_as_the_field_knows_it() -> None:
    """Of normal weights: more bits, less noise; NF4 beats evenly spaced codes of as many bits."""
    weight = normal(64, 512)
    schemes = ("BINARY", "TERNARY", "MXFP4", "NF4", "FP8")
    ratios = [quantize_weight("w", weight, 0, SCHEMES[name], NEAREST).sqnr_db(weight) for name in schemes]
    assert all(after > before + 1 for before, after in itertools.pairwise(ratios))
    even = quantize_weight("w", weight, 0, resolve("W4A16", group_size=64), NEAREST).sqnr_db(weight)
    assert ratios[3] > even


@pytest.mark.parametrize("name", FIXED)
def test_bad_values_are_refused(name: str) -> None:
    for method in (NEAREST, SMALLEST):
        bad = torch.ones(2, 32)
        bad[1, 3] = math.inf
        with pytest.raises(QuantizationError, match=r"^w: 1 of 64 weights are infinite"):
            quantize_weight("w", bad, 0, SCHEMES[name], method)
        with pytest.raises(QuantizationError, match="int64 cannot be quantized"):
            quantize_weight("w", torch.ones(2, 32, dtype=torch.int64), 0, SCHEMES[name], method)
