"""The fleet as rows of the page's table, and the numbers by which the script sorts, filters and opens them."""

import math
from collections.abc import Callable, Mapping, Sequence
from heapq import nlargest
from typing import Any

from markupsafe import Markup, escape

from ..runs.figures import (
    LOWER_IS_BETTER,
    MISSING,
    counted,
    elapsed,
    lost,
    measured,
    metric_of,
    sized,
    three_digits,
)
from ..runs.results import ModelResult, number
from .comparison import BAD, Comparison
from .timeline import Spent

LISTED = 10_000  # models of the table; a browser shows more of them badly
_TIMES = "\N{MULTIPLICATION SIGN}"
_TYPICAL_DIGITS = 6  # enough to sort by


def listed(models: Sequence[ModelResult]) -> list[ModelResult]:
    """The models of the table, in the order of the fleet: of very many all problems, then the largest."""
    if len(models) <= LISTED:
        return list(models)
    ranked = nlargest(
        LISTED, range(len(models)), key=lambda index: (models[index].state in BAD, _bytes(models[index]))
    )
    return [models[index] for index in sorted(ranked)]


def _bytes(model: ModelResult) -> float:
    return number(model.before, "bytes") or 0.0


def used(model: ModelResult) -> float | None:
    """The share of the accepted drop that was used up; above 1 the model is rejected."""
    drop = lost(model)
    if drop is None or not model.max_drop:
        return None
    return drop / model.max_drop


def row(model: ModelResult, change: str | None) -> Markup:
    """The cells of a model behind its name. Written here and not in the template: there are thousands."""
    before, after = model.before or {}, model.after or {}
    metric, ratio, state = metric_of(model), model.compression_ratio, escape(model.state)
    lower = '<i title="lower is better">↓</i>' if metric in LOWER_IS_BETTER else ""
    trained = '<sup title="measured after training">t</sup>' if before.get("stage") == "trained" else ""
    left = None if not (size := number(before, "bytes")) else (number(after, "bytes") or 0) / size
    cells = [
        f'<td><b class="badge {state}">{state}</b>',
        *([] if change is None else [f"<td>{_change(change)}"]),
        f"<td>{escape(metric or MISSING)}{lower}",
        f"<td>{measured(number(before, 'value'))}{trained}",
        f"<td>{measured(number(after, 'value'))}",
        f"<td>{_drop(lost(model))}",
        f"<td>{_used(used(model))}",
        _titled(number(before, "bytes"), sized),
        _titled(number(after, "bytes"), sized),
        f"<td>{MISSING if ratio is None else three_digits(ratio) + _TIMES}{_left(left, model)}",
        f"<td>{three_digits(model.bits_per_weight)}",
    ]
    return Markup("".join(cells))


def _change(change: str) -> str:
    return f'<b class="{"badge " if change == "regressed" else "change "}{change.rsplit(maxsplit=1)[-1]}">{change}</b>'


def _titled(value: float | None, write: Callable[[float | None], str]) -> str:
    """A rounded number whose exact one is a hover away."""
    return f"<td>{MISSING}" if value is None else f'<td title="{value:,.0f} bytes">{write(value)}'


def _drop(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 0:
        return f'<b class="better">\N{MINUS SIGN}{measured(-value)}</b>'
    return measured(value) if value else "0"


def _used(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{100 * max(value, 0):.0f} %" if value < 10 else f"{value:.0f}{_TIMES}"
    return f'<b class="worse">{text}</b>' if value > 1 else text


def _left(left: float | None, model: ModelResult) -> str:
    """What is left of the bytes, as a bar."""
    if left is None or model.after is None:
        return ""
    return f'<svg class="left"><rect/><rect width="{min(100, 100 * left):.0f}%"/></svg>'


def columns(
    models: Sequence[ModelResult], comparison: Comparison, spent: Mapping[str, Spent]
) -> dict[str, list[Any]]:
    """What the script sorts by, a list for each column, in the order of the rows."""
    return {
        "before": [_short(number(model.before, "value")) for model in models],
        "after": [_short(number(model.after, "value")) for model in models],
        "drop": [_short(lost(model)) for model in models],
        "used": [_short(used(model)) for model in models],
        "bytes_before": [_short(number(model.before, "bytes")) for model in models],
        "bytes_after": [_short(number(model.after, "bytes")) for model in models],
        "ratio": [_short(model.compression_ratio) for model in models],
        "bits": [_short(model.bits_per_weight) for model in models],
        "facts": [_facts(model, comparison, spent.get(model.name)) for model in models],
    }


def _short(value: object) -> float | int | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    short = float(f"{value:.{_TYPICAL_DIGITS}g}")
    return int(short) if short == int(short) else short


def _facts(model: ModelResult, comparison: Comparison, spent: Spent | None) -> list[Any]:
    """What an opened model tells beside its row, as text; the script knows what each place means (FACTS there)."""
    before, after = model.before or {}, model.after or {}
    earlier = comparison.earlier.get(model.name)
    facts: list[Any] = [
        _pair(counted, number(before, "parameters"), number(after, "parameters")),
        _pair(counted, number(before, "macs"), number(after, "macs")),
        _pair(three_digits, number(before, "latency_ms"), number(after, "latency_ms"), " ms"),
        _one(three_digits, number(after, "latency_packed_ms"), " ms"),
        "" if model.max_drop is None else measured(model.max_drop),
        "" if spent is None else elapsed(spent.seconds),
        "" if spent is None or not spent.retries else str(spent.retries),
        "" if earlier is None else _earlier(earlier),
        model.digest or "",
        model.reason or "",
    ]
    while facts and facts[-1] == "":
        facts.pop()
    return facts


def _earlier(model: ModelResult) -> str:
    size, value = number(model.after, "bytes"), number(model.after, "value")
    told = [
        model.state,
        *([] if size is None else [sized(size)]),
        *([] if value is None else [measured(value)]),
    ]
    return ", ".join(told)


def _pair(
    write: Callable[[float | None], str], before: float | None, after: float | None, unit: str = ""
) -> str:
    if before is None and after is None:
        return ""
    return f"{write(before)} → {write(after)}{unit}"


def _one(write: Callable[[float | None], str], value: float | None, unit: str) -> str:
    return "" if value is None else write(value) + unit
