import itertools
import math

import pytest
import torch

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer, quantize_weight
from fleetpress.compression.scheme import SCHEMES, resolve
from fleetpress.compression.selection import Layer

METHOD = QUANTIZERS["round_to_nearest"]


def test_the_table_names_methods_by_their_names():
    assert all(name == method.name and method.paper and method.summary for name, method in QUANTIZERS.items())


@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 3, 3), 0), ((4, 6, 3, 3), 1), ((10, 6), 1), ((6, 5), 0)])
def test_units_lie_along_the_axis(shape, axis):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    unit = weight.select(axis, 2)
    unit *= 1000
    quantized = quantize_weight("w", weight, axis, SCHEMES["W8A16"], METHOD)
    back = quantized.dequantize()
    assert quantized.codes.shape == (6, weight.numel() // 6)
    assert quantized.scale.shape == (6, 1)
    assert back.shape == weight.shape
    assert back.is_contiguous()
    others = [index for index in range(6) if index != 2]
    at = torch.tensor(others)
    # Units do not share scales: the large one costs the others nothing.
    assert float((back - weight).index_select(axis, at).abs().max()) < 0.05


def test_sqnr_grows_by_six_decibels_a_bit():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    ratios = [
        quantize_weight("w", weight, 0, resolve(num_bits=bits), METHOD).sqnr_db(weight)
        for bits in range(4, 8)
    ]
    assert all(5 < after - before < 7 for before, after in itertools.pairwise(ratios))
    exact = torch.tensor([[-2.0, 1.0, 0.0, -1.0]])
    assert quantize_weight("w", exact, 0, resolve("W2A16_ASYM"), METHOD).sqnr_db(exact) == math.inf


def test_sqnr_is_the_definition():
    weight = torch.randn(8, 30, generator=torch.Generator().manual_seed(5)).half()
    quantized = quantize_weight("w", weight, 0, resolve(num_bits=4, strategy="tensor"), METHOD)
    noise = (weight.double() - quantized.dequantize().double()).square().sum()
    expected = 10 * math.log10(float(weight.double().square().sum() / noise))
    assert quantized.sqnr_db(weight) == pytest.approx(expected, rel=1e-12)


def test_group_size_is_what_was_used():
    weight = torch.ones(4, 40)
    assert quantize_weight("w", weight, 0, SCHEMES["W4A16"], METHOD).group_size == 40
    assert quantize_weight("w", weight, 0, resolve("W4A16", group_size=16), METHOD).group_size == 16
    assert quantize_weight("w", weight, 0, SCHEMES["W8A16"], METHOD).group_size is None


def test_a_layer_gives_its_weights_and_not_its_biases():
    values = {"l.w0": torch.randn(8, 3), "l.w1": torch.randn(8, 2), "l.b": torch.randn(8)}
    layer = Layer(name="l", kind="LSTM", weights=("l.w0", "l.w1"), biases=("l.b",), axis=0, nodes=("lstm",))
    quantized = quantize_layer(layer, values, SCHEMES["W8A16"], METHOD)
    assert list(quantized) == ["l.w0", "l.w1"]
    assert quantized["l.w1"].shape == (8, 2)


def test_errors_name_the_weight():
    with pytest.raises(QuantizationError, match=r"^fc\.weight: 6 of 6 weights are NaN"):
        quantize_weight("fc.weight", torch.full((2, 3), math.nan), 0, SCHEMES["W8A16"], METHOD)
    with pytest.raises(QuantizationError, match=r"^fc\.weight: a weight of shape \(0, 3\) has no rows"):
        quantize_weight("fc.weight", torch.ones(0, 3), 0, SCHEMES["W8A16"], METHOD)


def test_the_weight_stays_as_it_is():
    weight = torch.nn.Parameter(torch.randn(4, 30))
    before = weight.detach().clone()
    quantize_weight("w", weight, 0, SCHEMES["W4A16_ASYM"], METHOD)
    assert torch.equal(weight, before)
