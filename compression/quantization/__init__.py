"""Quantization of weights: methods by name, and a layer's weights quantized with one of them."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization import (
    coordinate_descent,
    gptq,
    half_quadratic,
    k_means,
    learned_rounding,
    round_to_nearest,
    smallest_error,
    weighted_k_means,
)
from fleetpress.compression.quantization.activations import input_grid
from fleetpress.compression.quantization.weight import (
    QuantizedWeight,
    QuantizeMethod,
    check_method,
    joined,
    to_rows,
)
from fleetpress.compression.scheme import DEFAULT_METHOD, QuantScheme
from fleetpress.compression.selection import Layer

__all__ = [
    "QUANTIZERS",
    "QuantizeMethod",
    "QuantizedWeight",
    "check_method",
    "method_for",
    "quantize_layer",
    "quantize_weight",
]

QUANTIZERS: dict[str, QuantizeMethod] = {
    "round_to_nearest": round_to_nearest.METHOD,
    "smallest_error": smallest_error.METHOD,
    "half_quadratic": half_quadratic.METHOD,
    "gptq": gptq.METHOD,
    "coordinate_descent": coordinate_descent.METHOD,
    "learned_rounding": learned_rounding.METHOD,
    "k_means": k_means.METHOD,
    "weighted_k_means": weighted_k_means.METHOD,
}


# Takes the place of a method that needs inputs where a weight has no statistics of them.
WITHOUT_INPUTS = smallest_error.METHOD


def method_for(method: QuantizeMethod, statistics: WeightStatistics | None) -> QuantizeMethod:
    """The method, or the one that takes its place for a weight whose inputs were not or cannot be observed."""
    if not method.needs_inputs or statistics is not None:
        return method
    return k_means.METHOD if method.learns_codebook else WITHOUT_INPUTS


def quantize_layer(
    layer: Layer,
    values: Mapping[str, Tensor],
    scheme: QuantScheme,
    method: QuantizeMethod,
    statistics: Mapping[str, WeightStatistics] | None = None,
) -> dict[str, QuantizedWeight]:
    """Every weight of the layer (not its biases), by state name, quantized from the tensors in `values`.

    `statistics` are by state name, too. Raises QuantizationError with the weight's name for values that cannot be
    quantized.
    """
    known = statistics or {}
    return {
        name: quantize_weight(name, values[name], layer.axis, scheme, method, statistics=known.get(name))
        for name in layer.weights
    }


def quantize_weight(
    name: str,
    weight: Tensor,
    axis: int,
    scheme: QuantScheme,
    method: QuantizeMethod,
    *,
    statistics: WeightStatistics | None = None,
) -> QuantizedWeight:
    """The weight `name`, of two dimensions or more with its output units along `axis`, quantized.

    Without statistics a method that needs them gives way to `WITHOUT_INPUTS`. Raises QuantizationError with the name
    for NaN or infinite values, no values, or a dtype that is no floating point; MethodError for codes that the method
    does not make.
    """
    check_method(method, scheme)
    weight = weight.detach()
    if weight.dim() < 2 or weight.numel() == 0:
        raise QuantizationError(
            f"{name}: a weight of shape {tuple(weight.shape)} has no rows to quantize; add the layer to `ignore`"
        )
    chosen = method_for(method, statistics)
    try:
        whole = chosen.learns_codebook  # one for all groups
        if statistics is not None and chosen.needs_inputs and statistics.inputs.groups > 1 and not whole:
            rows = _by_groups(to_rows(weight, axis), scheme, chosen, statistics)
        else:
            rows = chosen.quantize(to_rows(weight, axis), scheme, statistics)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from None
    whole_weight = replace(rows, shape=tuple(weight.shape), axis=axis)
    if scheme.activation_bits is None:
        return whole_weight
    if statistics is None:
        raise QuantizationError(
            f"{name}: its inputs were not observed; quantize it with a scheme such as W8A16"
        )
    scale, zero_point = input_grid(statistics.inputs, narrowed=chosen is not QUANTIZERS[DEFAULT_METHOD])
    return replace(whole_weight, input_scale=scale, input_zero_point=zero_point)


def _by_groups(
    rows: Tensor, scheme: QuantScheme, method: QuantizeMethod, statistics: WeightStatistics
) -> QuantizedWeight:
    """Rows of a convolution with groups: those of a group read the same inputs, so they are quantized together."""
    if scheme.strategy == "tensor":  # one scale for all of them
        return WITHOUT_INPUTS.quantize(rows, scheme)
    groups = statistics.inputs.groups
    parts = [
        method.quantize(part, scheme, statistics.group(index))
        for index, part in enumerate(rows.chunk(groups))
    ]
    return joined(parts)
