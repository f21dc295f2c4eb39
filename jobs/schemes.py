"""The quantization scheme that a recipe means, and it and zeroed weights in words."""

from collections.abc import Mapping
from typing import Any

from fleetpress.compression.scheme import QuantScheme, resolve


def scheme_of(options: Mapping[str, Any]) -> QuantScheme:
    """The scheme of a recipe's `quantize` step."""
    return resolve(
        **{
            key: options[key]
            for key in ("scheme", "num_bits", "symmetric", "group_size", "strategy")
            if key in options
        }
    )


def scheme_label(scheme: QuantScheme) -> str:
    """A scheme in a few words."""
    group = f" g{scheme.group_size}" if scheme.group_size else f" {scheme.strategy}"
    return f"{scheme.num_bits} bits{'' if scheme.symmetric else ' asym'}{group}"


def zeroing_label(options: Mapping[str, Any]) -> str | None:
    """What a `prune` step that zeroes weights does to a weight, in a few words; None for no options."""
    if not options:
        return None
    return f"{options['pattern']} kept" if "pattern" in options else f"{options['sparsity']:.0%} zeroed"
