"""Training weights for the codes that they will become: quantized on the way forward, as they are on the way back.

The forward pass computes with `(code - zero_point) * scale`, in the arithmetic of `affine`; gradients pass the rounding
as if it were not there (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), except where a weight lies
outside the range. Scales start where the recipe's method puts them, weights at its codes if it knows what they
multiply (`statistics`), and both are learned. The gradient of scales is
that of Esser et al. 2020 (Learned step size quantization, arXiv:1902.08153), taken of the logarithm, so that a scale
stays positive and moves by shares of itself (Jain et al. 2020, arXiv:1903.08066). Zero points stay.

What comes out are the codes' own values and their scales: quantized with these scales they give the codes that the last
forward pass would have seen, whatever the weights' dtype. Of schemes with a learned codebook that is trained instead
(`aware_codebooks`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.errors import MethodError
from fleetpress.compression.quantization import affine, codebooks, quantize_weight
from fleetpress.compression.quantization.aware_codebooks import CodebookForward
from fleetpress.compression.quantization.weight import (
    QuantizedWeight,
    QuantizeMethod,
    encoded,
    from_rows,
    to_rows,
)
from fleetpress.compression.scheme import QuantScheme

_SUMMARY = "Round to the nearest code under scales that were trained with the weights."


@dataclass(frozen=True, kw_only=True)
class AwareWeight:
    """How one weight will be quantized: its unit axis, its scheme, and what places the first scales or entries.

    With `statistics` of what it multiplies, training starts from the codes that the method finds by them. With
    `keeps_zero` an entry of a learned codebook is zero, whether or not there are zeros among the weights.
    Raises MethodError for codes that are neither integers nor indices into a learned codebook: FP8 and fixed codebooks.
    """

    axis: int
    scheme: QuantScheme
    method: QuantizeMethod
    statistics: WeightStatistics | None = None
    keeps_zero: bool = False

    def __post_init__(self) -> None:
        if self.scheme.type != "int" and not self.learns_codebook:
            raise MethodError(
                "weights are trained for integer codes and learned codebooks only; take a scheme such as W4A16 or "
                "method k_means, or leave quantization_aware out"
            )

    @property
    def learns_codebook(self) -> bool:
        """Whether entries of a codebook are trained, rather than scales."""
        return self.scheme.codebook == "learned"


@dataclass(frozen=True, kw_only=True)
class TrainedScales:
    """`scale` and `zero_point` of a weight, [rows, groups] as `quantize` stores them; None if symmetric.

    With a learned codebook its ascending `entries`; then `scale` is [1, 1], one, if the scheme has none.
    """

    scale: Tensor
    zero_point: Tensor | None
    entries: Tensor | None = None


def with_scales(trained: TrainedScales) -> QuantizeMethod:
    """The method that rounds to the nearest code under scales, or to the nearest entry, that were trained."""

    def quantize(
        rows: Tensor, scheme: QuantScheme, statistics: WeightStatistics | None = None
    ) -> QuantizedWeight:
        if trained.entries is None:
            return encoded(rows, trained.scale, trained.zero_point, scheme)
        scale = trained.scale if scheme.has_scale else None
        return QuantizedWeight(
            codes=codebooks.quantize(rows, scale, trained.entries, scheme),
            scale=trained.scale,
            zero_point=None,
            scheme=scheme,
            shape=tuple(rows.shape),
            codebook=trained.entries,
        )

    learned = trained.entries is not None
    return QuantizeMethod(
        name="trained",
        quantize=quantize,
        paper="see the module",
        summary=_SUMMARY,
        types=("codebook",) if learned else ("int",),
        learns_codebook=learned,
    )


class QuantizedForward:
    """The quantized weights of a training. `leaves` are trained beside the parameters: `logarithms` of scales, entries.

    Weights named in `zeroed` have zeros that must stay, or will get some. Raises MethodError for a name that is no
    parameter, QuantizationError with the name for values without a range.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        weights: Mapping[str, AwareWeight],
        zeroed: Collection[str] = (),
    ) -> None:
        for name in weights:
            if name not in params:
                raise MethodError(f"{name} is to be trained for its codes, but is no trained parameter")
        self._params = params
        self._weights = {name: weight for name, weight in weights.items() if not weight.learns_codebook}
        self._zero_points: dict[str, Tensor | None] = {}
        self.logarithms: dict[str, Tensor] = {}
        self.codebooks: dict[str, CodebookForward] = {}
        for name, weight in weights.items():
            found, place = self._first(name, weight), params[name].device
            if weight.learns_codebook:
                has_zero = weight.keeps_zero or name in zeroed
                self.codebooks[name] = CodebookForward(params[name], found, has_zero=has_zero)
                continue
            zero_point = found.zero_point
            self._zero_points[name] = None if zero_point is None else zero_point.to(place)
            self.logarithms[name] = found.scale.to(place).log().requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        """What is trained beside the parameters."""
        return [*self.logarithms.values(), *(shared.entries for shared in self.codebooks.values())]

    def leaf(self, name: str) -> Tensor:
        """What is trained beside the parameter of that name."""
        return self.codebooks[name].entries if name in self.codebooks else self.logarithms[name]

    def _first(self, name: str, weight: AwareWeight) -> QuantizedWeight:
        value = self._params[name].detach()
        found = quantize_weight(
            name, value.cpu(), weight.axis, weight.scheme, weight.method, statistics=weight.statistics
        )
        if weight.statistics is not None:
            value.copy_(found.dequantize().masked_fill(value.cpu() == 0, 0))  # zeros that pruning made stay
        return found

    def values(self) -> dict[str, Tensor]:
        """What the forward pass computes with, by state name: differentiable in parameters and `leaves`."""
        found = {name: shared.value() for name, shared in self.codebooks.items()}
        for name, weight in self._weights.items():
            parameter = self._params[name]
            rows = to_rows(parameter, weight.axis)
            scale = _spread(self.logarithms[name].exp(), rows.shape, weight.scheme)
            found[name] = from_rows(
                _through(rows, scale, self._offset(name), weight.scheme), tuple(parameter.shape), weight.axis
            )
        return found

    def _offset(self, name: str) -> Tensor | None:
        """The zero points as signed numbers, one per entry."""
        zero_point, weight = self._zero_points[name], self._weights[name]
        if zero_point is None:
            return None
        rows = to_rows(self._params[name], weight.axis)
        return _spread(zero_point.to(rows.dtype) - weight.scheme.middle, rows.shape, weight.scheme)

    def result(self, dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, Tensor], dict[str, TrainedScales]]:
        """Values of the weights and their scales, both in the stored `dtypes`; codes are those of the last values."""
        values, scales = {}, {}
        with torch.no_grad():
            for name, weight in self._weights.items():
                parameter, dtype = self._params[name].detach().cpu(), dtypes[name]
                zero_point = self._zero_points[name]
                trained = self.logarithms[name].detach().exp().cpu()
                zero_point = None if zero_point is None else zero_point.cpu()
                codes = affine.quantize(to_rows(parameter, weight.axis), trained, zero_point, weight.scheme)
                scale = _positive(trained.to(dtype))
                scales[name] = TrainedScales(scale=scale, zero_point=zero_point)
                rows = affine.dequantize(codes, scale, zero_point, weight.scheme)
                values[name] = from_rows(rows, tuple(parameter.shape), weight.axis)
            for name, shared in self.codebooks.items():
                values[name], scale, entries = shared.result(dtypes[name])
                scales[name] = TrainedScales(scale=scale, zero_point=None, entries=entries)
        return values, scales


def _positive(scale: Tensor) -> Tensor:
    """A scale that its dtype cannot tell from zero would lose the codes."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


def _spread(values: Tensor, shape: torch.Size, scheme: QuantScheme) -> Tensor:
    """One value per entry of `shape` [rows, columns], of `values` [rows, groups] or [1, 1]."""
    if scheme.strategy != "group" or scheme.group_size is None:
        return values.expand(shape)
    return values.repeat_interleave(scheme.group_size, dim=1)[:, : shape[1]]


def _through(rows: Tensor, scale: Tensor, offset: Tensor | None, scheme: QuantScheme) -> Tensor:
    result: Tensor = _Through.apply(rows, scale, offset, scheme.middle)  # type: ignore[no-untyped-call]
    return result


class _Through(torch.autograd.Function):
    """Quantize and dequantize; see the module for the gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, scale: Tensor, offset: Tensor | None, middle: int) -> Tensor:
        moved = rows / scale
        if offset is not None:
            moved = moved + offset
        held = moved.clamp(-middle, middle - 1)
        inside = (held == moved).to(rows.dtype)  # a number: products with it are faster than choices
        rounded = held.round()
        codes = rounded if offset is None else rounded - offset
        # Inside, the scale moves a value by its rounding error; outside, by the whole code.
        ctx.save_for_backward(
            inside, torch.addcmul(codes, inside, moved if offset is None else moved - offset, value=-1)
        )
        return codes * scale

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        inside, along_scale = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * inside, gradient * along_scale, None, None
