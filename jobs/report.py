"""A run as one self-contained HTML page: the same input gives the same page, and nothing is fetched to show it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from heapq import nlargest
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from fleetpress.storage.store import ObjectStore

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
from .results import REPORT, RUNS, FleetResult, ModelResult, counts, layers_of, write_summary

if TYPE_CHECKING:
    from jinja2 import Template

_TIMES = "\N{MULTIPLICATION SIGN}"
_BARS = 24  # more bars than that are a texture, not a picture


def page_of(store: ObjectStore, result: FleetResult) -> str:
    """The page of a run in the output at `store`, with the layers of its largest models."""
    return render_html(result, layers_of(store, result))


def write_end(store: ObjectStore, result: FleetResult) -> None:
    """Write down how a run ended: its page, and then the summary, which says that it is over."""
    store.put(f"{RUNS}{result.run}/{REPORT}", page_of(store, result).encode())
    write_summary(store, result)


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
    environment.filters.update(sized=sized, digits=three_digits, share=share, or_dash=_or_dash)
    return environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))


def _row(model: ModelResult) -> dict[str, Any]:
    metric = (model.before or {}).get("metric")
    return {
        "name": model.name,
        "lower": metric in LOWER_IS_BETTER,
        "retrained": (model.before or {}).get("stage") == "trained",
        "cells": _cells(model),
    }


def _cells(model: ModelResult) -> Markup:
    """The row of a model behind its name, in the order of the page's columns. Made here: there are thousands."""
    before, after = model.before or {}, model.after or {}
    state, metric = escape(model.state), before.get("metric")
    lower = ' <span class="soft" title="lower is better">↓</span>' if metric in LOWER_IS_BETTER else ""
    ratio = model.compression_ratio
    trained = '<sup title="after training">t</sup>' if before.get("stage") == "trained" else ""
    cells = [
        f'<td><span class="badge {state}">{state}</span></td>',
        f"<td>{escape(_or_dash(metric))}{lower}</td>",
        f"<td>{measured(number(before, 'value'))}{trained}</td>",
        f"<td>{measured(number(after, 'value'))}</td>",
        f"<td>{_drop(lost(model))}</td>",
        *(_titled(number(side, "bytes"), sized, " bytes") for side in (before, after)),
        f"<td>{MISSING if ratio is None else three_digits(ratio) + _TIMES}</td>",
        f"<td>{three_digits(model.bits_per_weight)}</td>",
        *(_titled(number(side, key), counted) for key in ("parameters", "macs") for side in (before, after)),
        f"<td>{three_digits(number(before, 'latency_ms'))}</td>",
        *(f"<td>{three_digits(number(after, key))}</td>" for key in ("latency_ms", "latency_packed_ms")),
    ]
    return Markup("".join(cells))


def _titled(value: float | None, write: Callable[[float | None], str], unit: str = "") -> str:
    """A rounded number whose exact one is a hover away."""
    return f"<td>{MISSING}</td>" if value is None else f'<td title="{value:,.0f}{unit}">{write(value)}</td>'


def _drop(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 0:
        return f'<span class="better">\N{MINUS SIGN}{measured(-value)}</span>'
    return measured(value) if value else "0"


def _bars(models: Sequence[ModelResult], left: Mapping[str, float]) -> list[dict[str, Any]]:
    """What is left of the largest models, in the order of the fleet; 1 is the original's size."""
    known = [model for model in models if model.name in left]
    largest = {
        model.name for model in nlargest(_BARS, known, key=lambda model: number(model.before, "bytes") or 0)
    }
    return [
        {
            "name": model.name,
            "state": model.state,
            "bytes": number(model.before, "bytes"),
            "left": left[model.name],
        }
        for model in known
        if model.name in largest
    ]


def _left(model: ModelResult) -> float | None:
    before, after = number(model.before, "bytes"), number(model.after, "bytes")
    return after / before if before and after is not None else None


def _detail(model: ModelResult, metrics: Mapping[str, Any]) -> dict[str, Any]:
    layers = [_layer(layer) for layer in metrics.get("layers", ())]
    return {
        "name": model.name,
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
