"""How numbers and foreign text are written for people: three digits that count, decimal units, nothing that hides."""

import math
from collections.abc import Mapping
from typing import Any

from .results import ModelResult, number

MISSING = "\N{EN DASH}"
# The directions of compression.metrics.METRICS, which lies behind torch; a test compares the two.
LOWER_IS_BETTER = frozenset({"mse", "perplexity"})


def counted(value: float | None) -> str:
    """A count: 999, 61.7k, 1.23M."""
    return _scaled(value, ("", "k", "M", "G", "T"))


def sized(value: float | None) -> str:
    """A number of bytes: 999 B, 12.3 kB, 1.23 MB; 1 MB is 10^6 bytes."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def measured(value: float | None) -> str:
    """A metric's value: four decimals, five digits that count above 10, three below 0.001."""
    if value is None:
        return MISSING
    if not math.isfinite(value) or (value and abs(value) < 0.001):
        return f"{value:.3g}"
    digits = 4 if abs(value) < 10 else 3 if abs(value) < 100 else 2 if abs(value) < 1000 else 1
    return f"{value:.{digits}f}"


def three_digits(value: float | None) -> str:
    """Three significant digits, without an exponent where a reader can do without: 0.0123, 4.13, 1234."""
    if value is None:
        return MISSING
    if not math.isfinite(value) or abs(value) < 1:
        return f"{value:#.3g}"
    return f"{value:.{_decimals(abs(value))}f}"


def share(value: float | None) -> str:
    """A share of one as a percentage."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def elapsed(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def metric_of(model: ModelResult) -> str | None:
    """The metric that was measured."""
    name = (model.before or {}).get("metric")
    return name if isinstance(name, str) and name else None


def lost(model: ModelResult) -> float | None:
    """How much worse the metric became, in its own unit; negative when it became better."""
    before, after = number(model.before, "value"), number(model.after, "value")
    if before is None or after is None:
        return None
    return after - before if metric_of(model) in LOWER_IS_BETTER else before - after


def accepted_drop(limit: float | str | None, before: Mapping[str, Any] | None) -> float | None:
    """How much worse the metric may get, in its own unit: `limit` is that, or as `1%` a share of the metric before."""
    value = number(before, "value")
    if limit is None or value is None:
        return None
    return abs(value) * float(limit.rstrip("%")) / 100 if isinstance(limit, str) else limit


def one_line(text: object) -> str:
    """Text from a file or a server on one line, without characters that would move a terminal's cursor."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(str(text).split()))


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return f"{value}{units[0]}"
    if abs(value) < 1000:
        return f"{value:.0f}{units[0]}" if value == round(value) else f"{value:.3g}{units[0]}"
    power = 1
    while abs(value) / 1000**power >= 999.5 and power < len(units) - 1:
        power += 1
    scaled = value / 1000**power
    return f"{scaled:.{_decimals(abs(scaled))}f}{units[power]}"


def _decimals(value: float) -> int:
    """Decimals that leave three significant digits, after rounding."""
    return 2 if value < 9.995 else 1 if value < 99.95 else 0
