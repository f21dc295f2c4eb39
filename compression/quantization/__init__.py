"""Quantization of weights: methods by name, and a layer's weights quantized with one of them."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization import round_to_nearest, smallest_error
from fleetpress.compression.quantization.weight import (
    QuantizedWeight,
    QuantizeMethod,
    check_integers,
    to_rows,
)
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.selection import Layer

__all__ = ["QUANTIZERS", "QuantizeMethod", "QuantizedWeight", "quantize_layer", "quantize_weight"]

QUANTIZERS: dict[str, QuantizeMethod] = {
    "round_to_nearest": round_to_nearest.METHOD,
    "smallest_error": smallest_error.METHOD,
}


def quantize_layer(
    layer: Layer, values: Mapping[str, Tensor], scheme: QuantScheme, method: QuantizeMethod
) -> dict[str, QuantizedWeight]:
    """Every weight of the layer (not its biases), by state name, quantized from the tensors in `values`.

    Raises QuantizationError with the weight's name for values that cannot be quantized.
    """
    return {name: quantize_weight(name, values[name], layer.axis, scheme, method) for name in layer.weights}


def quantize_weight(
    name: str, weight: Tensor, axis: int, scheme: QuantScheme, method: QuantizeMethod
) -> QuantizedWeight:
    """The weight `name`, of two dimensions or more with its output units along `axis`, quantized.

    Raises QuantizationError with the name for NaN or infinite values, no values, or a dtype that is no floating point;
    MethodError for FP8, whose codes are no integers (checkpoints take `float8`).
    """
    check_integers(scheme)
    weight = weight.detach()
    if weight.dim() < 2 or weight.numel() == 0:
        raise QuantizationError(
            f"{name}: a weight of shape {tuple(weight.shape)} has no rows to quantize; add the layer to `ignore`"
        )
    try:
        rows = method.quantize(to_rows(weight, axis), scheme)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from None
    return replace(rows, shape=tuple(weight.shape), axis=axis)
