"""Learned rounding: offsets of the weights before they are rounded, and ranges, trained by signed gradients."""

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.quantization.range_search import best_scales
from fleetpress.compression.quantization.values import compute_dtype
from fleetpress.compression.quantization.weight import QuantizedWeight, QuantizeMethod
from fleetpress.compression.scheme import QuantScheme

ITERATIONS = 200  # and steps of 1 / ITERATIONS that shrink to nothing: both as in AutoRound


def learned_rounding(
    rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None
) -> QuantizedWeight:
    """Codes, scales and zero points of `rows` [output units, entries], from those of `smallest_error` on.

    Descends tr(D G D^T) with the straight-through gradient of the rounding; every unit keeps the best codes that it
    saw, so none ends worse than it started. The gradient is exact over all calibration rows: no seed, no batches.
    Measured on MiniLM, `coordinate_descent` is better everywhere and ten times as fast: 2.1 dB less error of outputs
    at 4 bits in groups, 2.0 at 3, 1.7 at 2. It is here for comparison.
    Raises QuantizationError for bad values.
    """
    assert statistics is not None, "a method that needs inputs is called with statistics"
    scale, zero_point = best_scales(rows, scheme)
    return _Training(rows, scale, zero_point, scheme, statistics.inputs).run()


class _Training:
    def __init__(
        self,
        rows: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: QuantScheme,
        inputs: InputStatistics,
    ) -> None:
        self._scheme, self._dtype, self._zero_point = scheme, rows.dtype, zero_point
        compute = compute_dtype(rows.dtype)
        columns = rows.shape[1]
        self._weight, self._start = rows.to(compute), scale.to(compute)
        self._blocks = [(at, gram.to(compute)) for at, gram in inputs.blocks()]
        size = scheme.group_size if scheme.strategy == "group" and scheme.group_size else columns
        self._group = torch.arange(columns) // size
        self._zero = torch.zeros((), dtype=compute)
        if zero_point is not None:
            self._zero = self._spread(zero_point.to(compute) - scheme.middle)

    def run(self) -> QuantizedWeight:
        """The best that was seen."""
        offset, share = torch.zeros_like(self._weight), torch.ones_like(self._start)
        codes = torch.empty(self._weight.shape, dtype=torch.uint8)
        best = self._start.expand(self._weight.shape[0], -1).to(self._dtype).clone()
        least = torch.full((self._weight.shape[0],), torch.inf, dtype=torch.float64)
        for iteration in range(ITERATIONS + 1):
            scale = (self._start * share).to(self._dtype)
            step = self._spread(scale.to(self._weight.dtype))
            exact = self._weight / step
            moved = exact + self._zero + offset
            code = moved.clamp(-self._scheme.middle, self._scheme.middle - 1)
            inside = code == moved
            code.round_()
            taken = code - self._zero
            error = self._weight - (taken * step).to(self._dtype).to(step.dtype)
            pull = torch.empty_like(error)
            for at, gram in self._blocks:
                torch.mm(error[:, at], gram, out=pull[:, at])
            squares = (pull * error).sum(1, dtype=torch.float64)
            better = self._better(squares, least)
            least = torch.where(better, squares, least)
            codes[better] = (code[better] + self._scheme.middle).to(torch.uint8)
            best[better] = scale.expand_as(best)[better]
            rate = (1 - iteration / ITERATIONS) / ITERATIONS
            # d value / d offset is the step, d value / d share what the value would be, less what follows the weight.
            offset.add_((pull * inside).sign_(), alpha=rate).clamp_(-0.5, 0.5)
            slope = pull.mul_(torch.where(inside, taken - exact, taken)).mul_(step)
            share.add_(self._gathered(slope).sign_(), alpha=rate).clamp_(0.5, 1.5)
        return QuantizedWeight(
            codes=codes,
            scale=best[:1] if self._scheme.strategy == "tensor" else best,
            zero_point=self._zero_point,
            scheme=self._scheme,
            shape=tuple(codes.shape),
        )

    def _better(self, squares: Tensor, least: Tensor) -> Tensor:
        """Which units improved; all or none where they share a scale."""
        if self._scheme.strategy == "tensor":
            return (squares.sum() < least.sum()).expand_as(squares)
        return squares < least

    def _spread(self, values: Tensor) -> Tensor:
        """Values [rows, groups] of groups as those of columns [rows, columns]."""
        return values[:, self._group] if values.shape[1] > 1 else values

    def _gathered(self, values: Tensor) -> Tensor:
        """The opposite for slopes: sums over the columns of each group."""
        if self._scheme.strategy == "tensor":
            return values.sum().view(1, 1)
        sums = values.new_zeros(values.shape[0], self._start.shape[1])
        return sums.index_add_(1, self._group, values)


METHOD = QuantizeMethod(
    name="learned_rounding",
    quantize=learned_rounding,
    paper="Cheng et al. 2023, AutoRound, arXiv:2309.05516, layer by layer as AdaRound (Nagel et al. 2020, "
    "arXiv:2004.10568)",
    summary="Trains which way each weight is rounded, and ranges, by signed gradients; needs calibration data.",
    needs_inputs=True,
)
