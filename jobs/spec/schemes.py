"""The quantization scheme that a recipe means, and it and zeroed weights in words."""

from collections.abc import Mapping
from typing import Any

from fleetpress.compression.scheme import LEARNING_METHODS, QuantScheme, resolve


def scheme_of(options: Mapping[str, Any]) -> QuantScheme:
    """The scheme of a recipe's `quantize` step, as far as it is that of all layers."""
    return resolve(
        **{
            key: options[key]
            for key in ("scheme", "num_bits", "symmetric", "group_size", "strategy")
            if key in options
        },
        learned=options.get("method") in LEARNING_METHODS,
    )


def options_of(options: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """The step's options for one layer: its own go first, and its own scheme or bits before any of the step's."""
    own: Mapping[str, Any] | None = options.get("layers", {}).get(layer)
    if own is None:
        return dict(options)
    replaced = (
        {"scheme", "num_bits", "symmetric", "group_size", "strategy"}
        if own.keys() & {"scheme", "num_bits"}
        else set()
    )
    return {key: value for key, value in options.items() if key not in replaced} | dict(own)


def scheme_label(scheme: QuantScheme) -> str:
    """A scheme in a few words."""
    group = f" g{scheme.group_size}" if scheme.group_size else f" {scheme.strategy}"
    if scheme.codebook is not None:
        return f"{scheme.num_bits} bits {scheme.codebook}{group if scheme.has_scale else ''}"
    if scheme.type == "float":
        return f"{scheme.num_bits} bits float{group}"
    inputs = f", inputs {scheme.activation_bits} bits" if scheme.activation_bits else ""
    return f"{scheme.num_bits} bits{'' if scheme.symmetric else ' asym'}{group}{inputs}"


def zeroing_label(options: Mapping[str, Any]) -> str | None:
    """What a `prune` step that zeroes weights does to a weight, in a few words; None for no options."""
    if not options:
        return None
    return f"{options['pattern']} kept" if "pattern" in options else f"{options['sparsity']:.0%} zeroed"
