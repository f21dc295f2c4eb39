"""The layers of a model as the page's script draws them: short lists of what is shown, for the largest models."""

import math
from collections.abc import Mapping, Sequence
from heapq import nlargest
from typing import Any

from ..runs.figures import (
    share,
    sized,
    three_digits,
)
from ..runs.results import number

MOST_LAYERS = 300  # of one model; a page of 50 models stays readable and light
_LEAST_LAYERS = 20
_ALL_LAYERS = 4000
_LONGEST = 160


def layer_rows(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By model: `layers` in their order (of very many the largest ones), how many there are `of`, and `warnings`.

    A layer is [name, kind, removed units, sparsity, bits, group size, bytes before, bytes after, SQNR in dB, relative
    error, why it was skipped], all as text.
    """
    most = max(_LEAST_LAYERS, min(MOST_LAYERS, _ALL_LAYERS // max(1, len(metrics))))
    return {name: _model(its, most) for name, its in metrics.items()}


def _model(metrics: Mapping[str, Any], most: int) -> dict[str, Any]:
    told, warnings = metrics.get("layers"), metrics.get("warnings")
    layers = [layer for layer in told if isinstance(layer, Mapping)] if isinstance(told, list) else []
    chosen: Sequence[int] = range(len(layers))
    if len(layers) > most:
        largest = nlargest(most, chosen, key=lambda index: number(layers[index], "bytes_before") or 0.0)
        chosen = sorted(largest)
    return {
        "layers": [_layer(layers[index]) for index in chosen],
        "of": len(layers),
        "warnings": [_cut(text) for text in warnings[:20]] if isinstance(warnings, list) else [],
    }


def _layer(layer: Mapping[str, Any]) -> list[str]:
    units, sparsity, sqnr = layer.get("removed_units"), number(layer, "sparsity"), number(layer, "sqnr_db")
    removed = len(units) if isinstance(units, list) else 0
    known = removed and sparsity
    before, after = number(layer, "bytes_before"), number(layer, "bytes_after")
    return [
        _cut(layer.get("name")),
        _cut(layer.get("kind")),
        f"{removed} of {round(removed / sparsity)}" if known and sparsity else str(removed or ""),
        share(sparsity) if sparsity else "",
        _whole(number(layer, "num_bits")),
        _whole(number(layer, "group_size")),
        "" if before is None else sized(before),
        "" if after is None else sized(after),
        "" if sqnr is None else three_digits(sqnr),
        "" if sqnr is None else relative_error(sqnr),
        _cut(layer.get("skipped")),
    ]


def relative_error(sqnr_db: float) -> str:
    """The root-mean-square error of the weights as a share of their own: 20 dB are 10 %."""
    error = 10 ** (-min(max(sqnr_db, -100.0), 400.0) / 20) if math.isfinite(sqnr_db) else 0.0
    return f"{three_digits(100 * error)} %" if error >= 1e-6 else "0 %"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _cut(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
