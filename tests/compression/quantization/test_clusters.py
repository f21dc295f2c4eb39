import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, clusters, quantize_weight
from fleetpress.compression.quantization.clusters import SortedNumbers, best_centers
from fleetpress.compression.scheme import SCHEMES, resolve

K_MEANS, WEIGHTED = QUANTIZERS["k_means"], QUANTIZERS["weighted_k_means"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(squares: torch.Tensor, gradients: torch.Tensor | None = None) -> WeightStatistics:
    groups, columns = squares.shape
    inputs = InputStatistics(
        rows=1,
        total=torch.zeros(groups, columns),
        squares=squares,
        gram=torch.zeros(groups, 1, 1, 1),
        range=torch.zeros(2),
    )
    return WeightStatistics(inputs=inputs, output_squares=gradients)


def best_by_trying(values: list[float], weights: list[float], count: int) -> float:
    """The smallest error of all ways to cut the sorted numbers into runs."""
    pairs = sorted(zip(values, weights, strict=True))

    def error(run: list[tuple[float, float]]) -> float:
        mass = sum(weight for _, weight in run)
        mean = sum(value * weight for value, weight in run) / mass if mass else 0.0
        return sum(weight * (value - mean) ** 2 for value, weight in run)

    return min(
        sum(error(pairs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(pairs))))
        for cuts in itertools.combinations_with_replacement(range(len(pairs) + 1), count - 1)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(1, 9)), min_size=1, max_size=9), st.integers(1, 4)
)
def test_few_numbers_get_the_optimum(pairs: list[tuple[int, int]], count: int) -> None:
    values, weights = [a / 8 for a, _ in pairs], [float(b) for _, b in pairs]
    numbers = SortedNumbers(torch.tensor(values), torch.tensor(weights))
    centers = best_centers(numbers, count)
    assert torch.equal(centers, centers.sort().values)
    assert len(centers) == count
    assert numbers.error(centers) == pytest.approx(best_by_trying(values, weights, count), abs=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_worse_than_scikit_learn(bits: int) -> None:
    weight = normal(60, 50, seed=bits)
    weight[:3] *= 9  # a heavy tail
    quantized = quantize_weight("w", weight, 0, resolve(num_bits=bits, learned=True), K_MEANS)
    mine = float((quantized.dequantize() - weight).double().square().sum())
    theirs = KMeans(1 << bits, n_init=3, random_state=0).fit(weight.view(-1, 1).double().numpy())
    assert mine <= theirs.inertia_ * (1 + 1e-9)


def test_many_numbers_move_together_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = normal(3001), normal(3001, seed=1).square()
    whole = SortedNumbers(values, weights)
    monkeypatch.setattr(clusters, "_MOST_PLACES", 1000)
    monkeypatch.setattr(clusters, "_TILE_ROWS", 300)
    fewer = SortedNumbers(values, weights)
    assert len(fewer.values) == 751
    for mine, other in ((fewer.mass, whole.mass), (fewer.first, whole.first), (fewer.second, whole.second)):
        assert float(mine[-1]) == pytest.approx(float(other[-1]), rel=1e-12)
    assert whole.error(best_centers(fewer, 8)) < 1.01 * whole.error(best_centers(whole, 8))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["tensor", "channel", "group"]),
    st.integers(0, 99),
)
def test_codes_are_the_nearest_entries_and_zero_stays_zero(
    bits: int, dtype: torch.dtype, strategy: str, seed: int
) -> None:
    weight = normal(6, 21, seed=seed).to(dtype)
    weight[normal(6, 21, seed=seed + 1) > 0.3] = 0
    size = 8 if strategy == "group" else None
    scheme = resolve(num_bits=bits, learned=True, strategy=strategy, group_size=size)  # type: ignore[arg-type]
    quantized = quantize_weight("w", weight, 0, scheme, K_MEANS)
    again = quantize_weight("w", weight.clone(), 0, scheme, K_MEANS)
    assert quantized.codebook is not None
    assert torch.equal(quantized.codebook, again.codebook)
    assert torch.equal(quantized.codes, again.codes)
    assert quantized.codebook.shape == (1 << bits,)
    assert bool((quantized.codebook == 0).any())
    back = quantized.dequantize()
    assert back.dtype == dtype
    assert bool((back[weight == 0] == 0).all())
    if strategy == "tensor":
        distances = (weight.double()[..., None] - quantized.codebook.double()).abs().amin(-1)
        assert torch.allclose((back.double() - weight.double()).abs(), distances, atol=1e-6)


def test_eight_bits_keep_what_has_few_values() -> None:
    weight = torch.linspace(-1, 1, 200).bfloat16()[torch.randint(0, 200, (16, 40))]
    quantized = quantize_weight("w", weight, 0, resolve(num_bits=8, learned=True), K_MEANS)
    assert torch.equal(quantized.dequantize(), weight)


def test_inputs_that_matter_get_smaller_errors() -> None:
    weight, squares = normal(32, 64), torch.ones(1, 64, dtype=torch.float64)
    squares[:, :8] = 100
    scheme = resolve(num_bits=3, learned=True)

    def cost(method: str, gradients: torch.Tensor | None = None) -> float:
        found = quantize_weight(
            "w", weight, 0, scheme, QUANTIZERS[method], statistics=statistics_of(squares, gradients)
        )
        errors = (found.dequantize() - weight).double().square() * squares
        return float((errors if gradients is None else errors * gradients[:, None]).sum())

    assert cost("weighted_k_means") < 0.9 * cost("k_means")
    gradients = torch.ones(32, dtype=torch.float64)
    gradients[0] = 1000
    assert cost("weighted_k_means", gradients) < 0.7 * cost("k_means", gradients)


def test_groups_of_a_convolution_share_the_codebook_and_weigh_for_themselves() -> None:
    weight, squares = normal(8, 5), torch.ones(2, 5, dtype=torch.float64)
    squares[1] = 1e6
    found = quantize_weight(
        "w", weight, 0, resolve(num_bits=2, learned=True), WEIGHTED, statistics=statistics_of(squares)
    )
    alone = quantize_weight("w", weight[4:], 0, resolve(num_bits=2, learned=True), K_MEANS)
    assert found.codebook is not None
    assert alone.codebook is not None
    assert torch.allclose(found.codebook, alone.codebook, atol=1e-3)


def test_without_statistics_k_means_takes_its_place() -> None:
    weight, scheme = normal(8, 30), resolve(num_bits=2, learned=True)
    one, other = (quantize_weight("w", weight, 0, scheme, method) for method in (K_MEANS, WEIGHTED))
    assert torch.equal(one.dequantize(), other.dequantize())
    blind = quantize_weight(
        "w", weight, 0, scheme, WEIGHTED, statistics=statistics_of(torch.zeros(1, 30, dtype=torch.float64))
    )
    assert torch.equal(one.dequantize(), blind.dequantize())


def test_methods_and_schemes_that_do_not_go_together() -> None:
    with pytest.raises(MethodError, match="k_means makes codebooks, not integer codes"):
        quantize_weight("w", normal(2, 2), 0, SCHEMES["W4A16"], K_MEANS)
    with pytest.raises(MethodError, match="k_means learns its own codebook, but the scheme has a nf4 one"):
        quantize_weight("w", normal(2, 2), 0, SCHEMES["NF4"], K_MEANS)
    learned = resolve(num_bits=4, learned=True)
    with pytest.raises(MethodError, match="round_to_nearest takes fixed codebooks only"):
        quantize_weight("w", normal(2, 2), 0, learned, QUANTIZERS["round_to_nearest"])
    with pytest.raises(QuantizationError, match=r"^w: 4 of 4 weights are NaN"):
        quantize_weight("w", torch.full((2, 2), torch.nan), 0, learned, K_MEANS)
