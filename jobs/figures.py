"""How numbers and foreign text are written for people: three digits that count, decimal units, nothing that hides."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .results import ModelResult

MISSING = "\N{EN DASH}"
# The directions of compression.metrics.METRICS, which lies behind torch; a test compares the two.
LOWER_IS_BETTER = frozenset({"mse", "perplexity"})


def number(fields: Mapping[str, Any] | None, key: str) -> float | None:
    """The number at `key`, None for whatever else a file may hold there."""
    value = (fields or {}).get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


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


def lost(model: ModelResult) -> float | None:
    """How much worse the metric became, in its own unit; negative when it became better."""
    before, after = number(model.before, "value"), number(model.after, "value")
    if before is None or after is None:
        return None
    return after - before if (model.before or {}).get("metric") in LOWER_IS_BETTER else before - after


def published_bytes(models: Iterable[ModelResult]) -> tuple[float, float]:
    """Bytes before and after of all models that are published; a rejected model saves nothing."""
    pairs = [
        (number(model.before, "bytes"), number(model.after, "bytes"))
        for model in models
        if model.state in ("published", "unchanged")
    ]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    return sum(before for before, _ in known), sum(after for _, after in known)


def one_line(text: object) -> str:
    """Text from a file or a server on one line, without characters that would move a terminal's cursor."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(str(text).split()))


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    if not math.isfinite(value) or abs(value) < 1000:
        return f"{value:.0f}{units[0]}" if value == round(value) else f"{value:.3g}{units[0]}"
    power = 1
    while abs(value) / 1000**power >= 999.5 and power < len(units) - 1:
        power += 1
    scaled = value / 1000**power
    return f"{scaled:.{_decimals(abs(scaled))}f}{units[power]}"


def _decimals(value: float) -> int:
    """Decimals that leave three significant digits, after rounding."""
    return 2 if value < 9.995 else 1 if value < 99.95 else 0
