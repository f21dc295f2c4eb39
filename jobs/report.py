"""A run as one self-contained HTML page: the same input gives the same page, and nothing is fetched to show it."""

from collections.abc import Mapping, Sequence
from functools import cache
from heapq import nlargest
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from .figures import (
    LOWER_IS_BETTER,
    MISSING,
    counted,
    elapsed,
    lost,
    measured,
    number,
    published_bytes,
    share,
    sized,
    three_digits,
)
from .results import FleetResult, ModelResult, counts

if TYPE_CHECKING:
    from jinja2 import Template

_BARS = 24  # more bars than that are a texture, not a picture


def render_html(result: FleetResult, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of a run; `metrics` holds the content of metrics.json by model, for those whose layers are shown.

    Every value is escaped: names and reasons come from files and servers.
    """
    before, after = published_bytes(result.models)
    left = {model.name: part for model in result.models if (part := _left(model)) is not None}
    good = sum(model.state in ("published", "unchanged") for model in result.models)
    return _template().render(
        result=result,
        elapsed=elapsed(result.seconds),
        counts=counts(result.models),
        good=good,
        before=before,
        after=after,
        ratio=before / after if after else None,
        problems=[model for model in result.models if model.reason],
        rows=[_row(model) for model in result.models],
        bars=_bars(result.models, left),
        bars_of=len(left),
        details=[_detail(model, metrics[model.name]) for model in result.models if model.name in metrics],
        details_of=sum(model.digest is not None for model in result.models),
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        counted=counted, sized=sized, measured=measured, digits=three_digits, share=share, or_dash=_or_dash
    )
    return environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))


def _row(model: ModelResult) -> dict[str, Any]:
    before, after = model.before or {}, model.after or {}
    metric = before.get("metric")
    return {
        "name": model.name,
        "state": model.state,
        "metric": metric,
        "lower": metric in LOWER_IS_BETTER,
        "retrained": before.get("stage") == "trained",
        "before": {
            key: number(before, key) for key in ("value", "parameters", "macs", "latency_ms", "bytes")
        },
        "after": {
            key: number(after, key)
            for key in ("value", "parameters", "macs", "latency_ms", "latency_packed_ms", "bytes")
        },
        "drop": lost(model),
        "ratio": model.compression_ratio,
        "bits_per_weight": model.bits_per_weight,
    }


def _bars(models: Sequence[ModelResult], left: Mapping[str, float]) -> list[dict[str, Any]]:
    """What is left of the largest models, in the order of the fleet; 1 is the original's size."""
    known = [model for model in models if model.name in left]
    largest = {
        model.name for model in nlargest(_BARS, known, key=lambda model: number(model.before, "bytes") or 0)
    }
    return [{**_row(model), "left": left[model.name]} for model in known if model.name in largest]


def _left(model: ModelResult) -> float | None:
    before, after = number(model.before, "bytes"), number(model.after, "bytes")
    return after / before if before and after is not None else None


def _detail(model: ModelResult, metrics: Mapping[str, Any]) -> dict[str, Any]:
    layers = [_layer(layer) for layer in metrics.get("layers", ())]
    return {
        "row": _row(model),
        "digest": model.digest,
        "layers": layers,
        "pruned": sum(bool(layer["removed"] or layer["sparsity"]) for layer in layers),
        "quantized": sum(layer["num_bits"] is not None for layer in layers),
        "warnings": list(metrics.get("warnings", ())),
    }


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    removed, sparsity = len(layer.get("removed_units") or ()), number(layer, "sparsity")
    return {
        "name": layer.get("name"),
        "kind": layer.get("kind"),
        "removed": removed,
        "units": round(removed / sparsity) if removed and sparsity else None,
        "sparsity": sparsity or None,  # of units that were removed, or of weights that were zeroed
        **{
            key: number(layer, key)
            for key in ("num_bits", "group_size", "bytes_before", "bytes_after", "sqnr_db")
        },
        "skipped": layer.get("skipped"),
    }


def _or_dash(value: object) -> object:
    return MISSING if value in (None, "") else value
