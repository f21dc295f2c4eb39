"""The quantization scheme that a recipe means."""

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
