"""Methods that look at the inputs: every one of them, against what its paper promises and against plain references."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, affine, quantize_weight
from fleetpress.compression.quantization.error_feedback import compensated, feedback_matrix
from fleetpress.compression.quantization.output_error import output_squares
from fleetpress.compression.quantization.range_search import best_scales as smallest_error_scales
from fleetpress.compression.scheme import QuantScheme, Strategy, resolve

SCHEMES = {
    "groups": resolve(scheme="W4A16", group_size=16),
    "ragged_groups": resolve(num_bits=3, group_size=20, symmetric=False),
    "channels": resolve(num_bits=2, strategy="channel"),
    "tensor": resolve(num_bits=4, strategy="tensor", symmetric=False),
    "bytes": resolve(num_bits=8, strategy="channel"),
}
NEEDING = [name for name, method in QUANTIZERS.items() if method.needs_inputs and not method.learns_codebook]
ROWS, COLUMNS = 12, 44


def inputs_of(x: Tensor, size: int | None = None) -> InputStatistics:
    """Statistics of input rows x [rows, columns], their products kept in blocks of `size`."""
    columns = x.shape[1]
    size = size or columns
    padded = torch.nn.functional.pad(x, (0, -columns % size))
    blocks = [part.T @ part for part in padded.split(size, 1)]
    return InputStatistics(
        rows=len(x),
        total=x.double().sum(0)[None],
        squares=x.double().square().sum(0)[None],
        gram=torch.stack(blocks)[None].float(),
        range=torch.stack([x.min(), x.max()]),
    )


def layer(
    dtype: torch.dtype = torch.float32, size: int | None = None
) -> tuple[Tensor, WeightStatistics, Tensor]:
    """A weight, statistics of correlated inputs whose sizes differ, and the inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.logspace(0, -1, COLUMNS)
    x = torch.randn(300, COLUMNS, generator=generator) @ mix + 0.5
    x[:, 7] = 0  # a dead input
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    weight[3] = 0
    return weight, WeightStatistics(inputs=inputs_of(x, size)), x


def output_error(found: Tensor, weight: Tensor, x: Tensor) -> float:
    return float(((found - weight).double() @ x.double().T).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_outputs_change_less_than_without_data_and_codes_fit(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight, statistics, x = layer(dtype)
    plain = QUANTIZERS["smallest_error"].quantize(weight, scheme)
    errors = {}
    for name in NEEDING:
        found = QUANTIZERS[name].quantize(weight, scheme, statistics)
        assert (found.codes.shape, found.codes.dtype) == (weight.shape, torch.uint8)
        assert found.scale.shape == plain.scale.shape
        assert (found.scale.dtype, found.dequantize().dtype) == (dtype, dtype)
        assert int(found.codes.max()) < 2**scheme.num_bits
        errors[name] = output_error(found.dequantize(), weight, x)
    before = output_error(plain.dequantize(), weight, x)
    # At 8 bits a bfloat16 weight is rounded as much by its own dtype as by its codes.
    assert errors["gptq"] < (0.75 if scheme.num_bits < 8 or dtype == torch.float32 else 1.05) * before
    assert errors["coordinate_descent"] <= errors["gptq"] * (1 + 1e-5)
    assert errors["learned_rounding"] <= before * (1 + 1e-5)


def gptq_by_the_book(weight: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, order: Tensor) -> Tensor:
    """Algorithm 1 of the paper without its blocks: the inverse is updated column by column. Signed codes of 4 bits."""
    weight, hessian = weight[:, order].double().clone(), gram[order][:, order].double().clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(order))
    inverse = torch.linalg.inv(hessian)
    codes = torch.empty(weight.shape, dtype=torch.float64)
    for column in range(len(order)):
        s, z = scale[:, order[column]].double(), zero[:, order[column]].double()
        codes[:, column] = (weight[:, column] / s + z).clamp(-8, 7).round()
        error = (weight[:, column] - (codes[:, column] - z) * s) / inverse[column, column]
        weight -= error[:, None] * inverse[column]
        # What is done is taken out of the problem: one step of Gaussian elimination.
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_gives_the_codes_of_the_textbook_loop(ordered: bool, symmetric: bool) -> None:
    weight, statistics, _ = layer(torch.float64)
    scheme = resolve(num_bits=4, group_size=11, symmetric=symmetric)
    scale, zero_point = affine.quantization_parameters(weight, scheme)
    found = compensated(weight, scale, zero_point, scheme, statistics.inputs, ordered=ordered)
    gram = statistics.inputs.gram[0, 0]
    order = gram.diagonal().argsort(descending=True) if ordered else torch.arange(COLUMNS)
    by_column = torch.arange(COLUMNS) // 11
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.double() - 8
    expected = gptq_by_the_book(weight, gram, scale[:, by_column], zero[:, by_column], order)
    assert torch.equal(found.codes.double() - 8, expected)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("name", ["gptq", "coordinate_descent"])
def test_with_few_bits_no_unit_is_worse_off_than_in_either_range(name: str, strategy: Strategy) -> None:
    weight, statistics, _ = layer()
    weight[5] = torch.where(weight[5] > 0, 1.0, -1.0)  # nothing lies inside: its full range is the better one
    weight[6, 0] = 20  # and here a narrowed one
    scheme, inputs = resolve(num_bits=2, strategy=strategy), statistics.inputs
    ranges = (smallest_error_scales(weight, scheme), affine.quantization_parameters(weight, scheme))
    alone = [
        output_squares(compensated(weight, *found, scheme, inputs).dequantize() - weight, inputs)
        for found in ranges
    ]
    error = output_squares(
        QUANTIZERS[name].quantize(weight, scheme, statistics).dequantize() - weight, inputs
    )
    if strategy == "tensor":
        assert error.sum() <= min(float(one.sum()) for one in alone) * (1 + 1e-5)
        return
    assert (alone[0] < alone[1]).any()
    assert (alone[1] < alone[0]).any()
    assert (error <= torch.minimum(*alone) * (1 + 1e-5) + 1e-9).all()


def test_feedback_is_the_inverse_s_in_one_factorization() -> None:
    _, statistics, _ = layer()
    gram = statistics.inputs.gram[0, 0].double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(COLUMNS)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    feedback = feedback_matrix(gram, 0.01)
    # Errors e of GPTQ's steps and d of the columns: e = d (F + I)^-1 diag(1 / U), U the factor of the inverse.
    torch.testing.assert_close(torch.linalg.inv(feedback), upper / upper.diagonal()[:, None])
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(feedback_matrix(gram, 0.01, order), feedback_matrix(gram[order][:, order], 0.01))


def test_a_gram_matrix_that_is_not_positive_definite_gets_more_damping() -> None:
    bad = torch.tensor([[1.0, 1.1, 0], [1.1, 1.0, 0], [0, 0, 1.0]])
    feedback = feedback_matrix(bad, 0.01)
    assert feedback.isfinite().all()
    assert torch.equal(feedback, feedback.triu())


@pytest.mark.parametrize("name", NEEDING)
def test_inputs_that_were_never_there(name: str) -> None:
    """Nothing is known of a layer that read zeros only: nothing better than rounding, and nothing worse."""
    weight, _, x = layer()
    nothing = WeightStatistics(inputs=inputs_of(torch.zeros_like(x)))
    scheme = SCHEMES["groups"]
    found = QUANTIZERS[name].quantize(weight, scheme, nothing).dequantize()
    assert torch.equal(found, QUANTIZERS["smallest_error"].quantize(weight, scheme).dequantize())


@pytest.mark.parametrize("name", NEEDING)
def test_a_gram_matrix_in_blocks_is_worth_less_than_the_whole_and_more_than_nothing(name: str) -> None:
    weight, whole, x = layer()
    scheme = resolve(num_bits=3, group_size=20)  # groups lie across blocks
    blocks = WeightStatistics(inputs=inputs_of(x, 16))
    errors = [
        output_error(QUANTIZERS[name].quantize(weight, scheme, known).dequantize(), weight, x)
        for known in (whole, blocks)
    ]
    plain = output_error(QUANTIZERS["smallest_error"].quantize(weight, scheme).dequantize(), weight, x)
    assert errors[0] < errors[1] < plain


@pytest.mark.parametrize("name", NEEDING)
def test_same_input_same_codes_and_the_weight_stays(name: str) -> None:
    weight, statistics, _ = layer()
    kept = weight.clone()
    first, second = (
        QUANTIZERS[name].quantize(weight, SCHEMES["ragged_groups"], statistics) for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("name", [*NEEDING, "half_quadratic"])
def test_bad_values_are_named(name: str) -> None:
    weight, statistics, _ = layer()
    weight[2, 3] = torch.nan
    with pytest.raises(QuantizationError, match=r"layer\.weight: 1 of 528 weights are NaN"):
        quantize_weight("layer.weight", weight, 0, SCHEMES["groups"], QUANTIZERS[name], statistics=statistics)


def test_the_objective_is_the_error_of_the_outputs() -> None:
    weight, statistics, x = layer()
    torch.testing.assert_close(
        output_squares(weight, statistics.inputs),
        (weight.double() @ x.double().T).square().sum(1),
        rtol=1e-5,
        atol=0,
    )


def test_every_single_code_of_coordinate_descent_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a fixed point no other value of one code alone has a smaller error."""
    from fleetpress.compression.quantization import coordinate_descent

    monkeypatch.setattr(coordinate_descent, "SWEEPS", 60)
    weight, statistics, x = layer(torch.float64)
    scheme = SCHEMES["groups"]
    found = coordinate_descent.coordinate_descent(weight, scheme, statistics)
    least = output_error(found.dequantize(), weight, x)
    for row, column in ((0, 0), (1, 13), (5, 30), (11, 43)):
        for code in range(16):
            codes = found.codes.clone()
            codes[row, column] = code
            other = affine.dequantize(codes, found.scale, found.zero_point, scheme)
            assert output_error(other, weight, x) >= least * (1 - 1e-6)


def test_more_sweeps_are_never_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    from fleetpress.compression.quantization import coordinate_descent

    weight, statistics, x = layer()
    errors = []
    for sweeps in (0, 1, 4):
        monkeypatch.setattr(coordinate_descent, "SWEEPS", sweeps)
        found = coordinate_descent.coordinate_descent(weight, SCHEMES["channels"], statistics)
        errors.append(output_error(found.dequantize(), weight, x))
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_groups_of_a_convolution_are_layers_of_their_own() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(50, 9) for _ in range(2)]
    single = [inputs_of(part) for part in parts]
    both = InputStatistics(
        rows=50,
        total=torch.cat([item.total for item in single]),
        squares=torch.cat([item.squares for item in single]),
        gram=torch.cat([item.gram for item in single]),
        range=torch.tensor([-4.0, 4.0]),
    )
    weight = torch.randn(6, 1, 3, 3)
    scheme = resolve(num_bits=3, strategy="channel")
    method = QUANTIZERS["gptq"]
    found = quantize_weight("w", weight, 0, scheme, method, statistics=WeightStatistics(inputs=both))
    expected = [
        method.quantize(rows, scheme, WeightStatistics(inputs=item))
        for rows, item in zip(weight.flatten(1).chunk(2), single, strict=True)
    ]
    assert torch.equal(found.codes, torch.cat([item.codes for item in expected]))
