"""Training a codebook with the weights that share it: looked up on the way forward, as it is on the way back.

The forward pass computes with `codebook[code]` (times the scale of the weight's group, if the scheme has scales), the
code being that of the entry nearest to the weight, as it is now. Weights of one code share an entry, so the gradient of
an entry is the sum of theirs (Han et al. 2016, Deep Compression, arXiv:1510.00149, section 3). There codes stay as they
are; here gradients also pass the look-up as if it were not there (straight-through estimator, Bengio et al. 2013,
arXiv:1308.3432), so that weights move and change their codes: `benchmarks/real/codebooks.py` measures both. Codebook
and scales start where the recipe's method puts them; scales stay.

Where weights are zero, or will be, one entry is zero and stays it.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fleetpress.compression.quantization import codebooks
from fleetpress.compression.quantization.values import compute_dtype
from fleetpress.compression.quantization.weight import QuantizedWeight, from_rows, to_rows
from fleetpress.compression.scheme import QuantScheme


class CodebookForward:
    """One weight of a training: its `entries` are trained beside the `parameter`. They begin as those of `first`.

    With `has_zero` one of them is zero, in any case if one is in the beginning.
    """

    def __init__(self, parameter: Tensor, first: QuantizedWeight, *, has_zero: bool) -> None:
        assert first.codebook is not None, "the scheme says that it has one"
        self._parameter, self._axis, self._scheme = parameter, first.axis, first.scheme
        self._scale = first.scale
        factor = torch.ones(1, 1)
        if first.scheme.has_scale:
            factor = _spread(codebooks.factors(first.scale, first.dtype), first.codes, first.scheme)
        self._factor = factor.to(parameter.device, parameter.dtype)
        entries = first.codebook.clone()
        self._moves = torch.ones(len(entries), dtype=torch.bool)
        if has_zero or bool((entries == 0).any()):
            zero = int(entries.abs().argmin())
            self._moves[zero], entries[zero] = False, 0
        self._moves = self._moves.to(parameter.device)
        self.entries = entries.to(parameter.device).requires_grad_()

    def value(self) -> Tensor:
        """What the forward pass computes with, differentiable in the parameter and in `entries`."""
        entries = torch.where(self._moves, self.entries, 0.0)  # what is zero has no gradient
        rows = to_rows(self._parameter, self._axis)
        found = _Shared.apply(rows, entries, self.codes(), self._factor)  # type: ignore[no-untyped-call]
        return from_rows(found, tuple(self._parameter.shape), self._axis)

    def codes(self) -> Tensor:
        """Which of the `entries` is nearest to every weight, [rows, columns]; of two as near the smaller one."""
        with torch.no_grad():
            order = self.entries.argsort(stable=True)
            work = to_rows(self._parameter, self._axis) / self._factor
            return order[torch.bucketize(work.contiguous(), codebooks.boundaries(self.entries[order]))]

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The weight in the stored `dtype`; the scale and the ascending entries under which it has these values.

        Without scales, `scale` is [1, 1], one.
        """
        entries = self.entries.detach().cpu()
        order = entries.argsort(stable=True)
        codes = order.argsort()[self.codes().cpu()].to(torch.uint8)
        entries, scale = entries[order], self._scale.to(dtype)
        if not self._scheme.has_scale:  # an entry is a weight as it is stored
            entries = entries.to(dtype).to(compute_dtype(dtype))
        own = scale if self._scheme.has_scale else None
        rows = codebooks.dequantize(codes, own, entries, self._scheme, dtype)
        return from_rows(rows, tuple(self._parameter.shape), self._axis), scale, entries


class _Shared(torch.autograd.Function):
    """Entries by their codes, times the factors; see the module for the gradients. Sums are in float64."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, entries: Tensor, codes: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(codes, factor)
        ctx.count = len(entries)  # type: ignore[attr-defined]
        return entries[codes] * factor

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        codes, factor = ctx.saved_tensors  # type: ignore[attr-defined]
        sums = torch.zeros(ctx.count, dtype=torch.float64, device=gradient.device)  # type: ignore[attr-defined]
        sums.index_add_(0, codes.flatten(), (gradient.double() * factor).flatten())
        return gradient, sums.to(gradient.dtype), None, None


def _spread(factor: Tensor, codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Each weight's scale, a shape that goes over `codes` [rows, columns]."""
    if scheme.group_size is None:
        return factor
    return factor.repeat_interleave(codebooks.group_counts(codes, scheme), dim=1)
