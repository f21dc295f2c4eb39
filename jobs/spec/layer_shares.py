"""Shares of single layers in a step that deletes units or zeroes weights."""

from collections.abc import Mapping
from typing import Any


def shares_of(step: Mapping[str, Any]) -> dict[str, float]:
    """The share of every layer that has one of its own, by the layer's name."""
    return {name: own["sparsity"] for name, own in step.get("layers", {}).items()}
