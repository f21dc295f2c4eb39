"""Rows longer than 4,096: what is solved with whole products is the direct solution, and better than in blocks."""

from dataclasses import replace

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.input_sums import InputSums
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight
from fleetpress.compression.quantization.error_feedback import DAMPING, columns_in_order
from fleetpress.compression.scheme import resolve

COLUMNS, UNITS, ROWS = 4200, 6, 8
SCHEME = resolve("W4A16_ASYM")


def inputs() -> Tensor:
    """Few input rows [ROWS, COLUMNS], so that all columns, near and far, depend on one another."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(COLUMNS, generator=generator).mul_(0.5).exp_()
    return torch.randn(ROWS, COLUMNS, generator=generator) * sizes


def observed(x: Tensor, size: int | None = None) -> InputStatistics:
    sums = InputSums(size=size)
    sums.add_range(x)
    sums.add(x.unsqueeze(1))
    found = sums.statistics("w")
    assert found is not None
    return found


def directly(weight: Tensor, made: QuantizedWeight, x: Tensor, known: InputStatistics) -> Tensor:
    """GPTQ in doubles without any matrix of columns: each target minimizes the damped error over all later columns.

    With H = c I + X^T X that is w_k + x_k^T (c I + S_k)^-1 y, S_k the sum of x_j x_j^T over j >= k, y the error of the
    outputs by the columns before (Woodbury).
    """
    order = columns_in_order(known.gram[0, 0])
    exact, plain = x.double()[:, order], weight.double()[:, order]
    damping = DAMPING * float(exact.square().sum()) / COLUMNS
    outer = exact.t().unsqueeze(2) * exact.t().unsqueeze(1)
    later = outer.flip(0).cumsum(0).flip(0) + damping * torch.eye(ROWS, dtype=torch.float64)
    pulls = torch.linalg.solve(later, exact.t().unsqueeze(2)).squeeze(2)  # [columns, rows]
    assert made.zero_point is not None
    groups = order // SCHEME.group_size
    scales, zeros = made.scale.double()[:, groups], made.zero_point.double()[:, groups]
    error = torch.zeros(UNITS, ROWS, dtype=torch.float64)
    values = torch.empty_like(plain)
    for column in range(COLUMNS):
        target = plain[:, column] + error @ pulls[column]
        scale, zero = scales[:, column], zeros[:, column]
        values[:, column] = ((target / scale + zero).round().clamp(0, 15) - zero) * scale
        error += torch.outer(plain[:, column] - values[:, column], exact[:, column])
    found = torch.empty_like(values)
    found[:, order] = values
    return found


def test_gptq_with_whole_products_is_the_direct_solution() -> None:
    x = inputs()
    weight = torch.randn(UNITS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.02
    known = observed(x)
    assert known.is_whole
    damping = DAMPING * float(x.double().square().sum()) / COLUMNS

    def errors(value: Tensor) -> tuple[float, float]:
        """Of the outputs, and with the damping that is minimized, too."""
        change = value.double() - weight.double()
        outputs = float((change @ x.double().t()).square().sum())
        return outputs, outputs + damping * float(change.square().sum())

    made = QUANTIZERS["gptq"].quantize(weight, SCHEME, WeightStatistics(inputs=known))
    value, direct = made.dequantize(), directly(weight, made, x, known)
    assert float((value.double() - direct).abs().gt(1e-6).double().mean()) < 0.01
    assert abs(errors(value)[1] / errors(direct)[1] - 1) < 1e-3
    blocks = replace(known, gram=observed(x, 512).gram)
    within = QUANTIZERS["gptq"].quantize(weight, SCHEME, WeightStatistics(inputs=blocks)).dequantize()
    assert errors(value)[0] < 0.2 * errors(within)[0]
