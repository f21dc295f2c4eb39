"""The measured criteria as plots and tables: docs/criteria/*.svg, and the tables inside docs/criteria.md."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Rows = Mapping[str, Mapping[str, Any]]

METRICS = {
    "digits-mlp": "accuracy",
    "mnist-cnn": "accuracy",
    "mnist-lenet5": "accuracy",
    "crepe-tiny": "raw pitch accuracy",
    "char-gpt": "bits per character, less is better",
}
COLOURS = {
    "gradient_stability": "#0072b2",
    "gradient_stability (train)": "#56b4e9",
    "taylor": "#d55e00",
    "fisher": "#e69f00",
    "wanda_structured": "#009e73",
    "magnitude": "#cc79a7",
    "random": "#777777",
}
_PANEL = (330, 230)  # of a drawing, in pixels
_LEFT, _TOP, _GAP, _BOTTOM = 52, 34, 46, 40


def write(measured: Mapping[str, Rows], root: Path) -> None:
    """Write the drawings, and the tables between their markers in the page."""
    page = root / "docs" / "criteria.md"
    text = page.read_text(encoding="utf-8")
    (root / "docs" / "criteria").mkdir(exist_ok=True)
    parts = {"summary": _summary(measured), "mean": _by_the_mean(measured), "mended": _mended(measured)}
    for net, rows in measured.items():
        if rows:
            parts[net] = _net_tables(net, rows)
            (root / "docs" / "criteria" / f"{net}.svg").write_text(_drawing(net, rows), encoding="utf-8")
    for name, table in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        assert found, f"docs/criteria.md has no part {start.strip()}"
        text = f"{before}{start}{table}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


def _values(rows: Rows, method: str, scope: str, share: float, what: str) -> list[float]:
    """One number a seed."""
    found = (row for key, row in sorted(rows.items()) if key.split("|", 1)[1] == f"{method}|{scope}|{share}")
    return [abs(row[what]) for row in found if what in row]


def _base(rows: Rows) -> list[float]:
    return [abs(row["metric"]) for key, row in sorted(rows.items()) if key.endswith("|unpruned")]


def _shares(rows: Rows, scope: str) -> list[float]:
    found = {float(key.split("|")[3]) for key in rows if key.count("|") == 3 and key.split("|")[2] == scope}
    return sorted(found, reverse=True)


def _shown(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent where they are shares."""
    if not values:
        return "-"
    factor, digits = (100, 1) if max(values) <= 1 else (1, 2)
    mean = statistics.fmean(values) * factor
    spread = statistics.stdev(values) * factor if len(values) > 1 else math.nan
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _net_tables(net: str, rows: Rows) -> str:
    """One table a scope: rows are criteria, columns are shares of MACs, before and after fine-tuning."""
    base = _base(rows)
    unit = METRICS[net] + (", %" if max(base) <= 1 else "")
    parts = [f"Unpruned: {_shown(base)} ({unit}; {len(base)} seed{'s' if len(base) > 1 else ''})."]
    for scope in ("layer", "global"):
        shares = _shares(rows, scope)
        head = [
            f"scope {scope}",
            *(f"{100 * share:.0f} % {stage}" for share in shares for stage in ("pruned", "tuned")),
        ]
        body = []
        for method in COLOURS:
            cells = [
                _shown(_values(rows, method, scope, share, stage))
                for share in shares
                for stage in ("before", "after")
            ]
            if any(cell != "-" for cell in cells):
                body.append(
                    [f"`{method}`" if " " not in method else "`gradient_stability`, while training", *cells]
                )
        if body:
            parts.append(_table(head, body))
    return "\n\n".join(parts)


def _better(net: str, one: float, other: float) -> bool:
    return one < other if "less is better" in METRICS[net] else one > other


def _summary(measured: Mapping[str, Rows]) -> str:
    """Mean rank of every criterion over nets and shares, scope layer: 1 is the best."""
    ranks: dict[tuple[str, str], list[float]] = {}
    cells = 0
    for net, rows in measured.items():
        for share in _shares(rows, "layer"):
            for stage in ("before", "after"):
                means = {
                    method: statistics.fmean(values)
                    for method in COLOURS
                    if (values := _values(rows, method, "layer", share, stage))
                }
                if len(means) < len(COLOURS) - 1:
                    continue
                cells += stage == "before"
                for method, mean in means.items():
                    better = sum(_better(net, other, mean) for other in means.values())
                    equal = sum(other == mean for other in means.values())
                    ranks.setdefault((method, stage), []).append(1 + better + (equal - 1) / 2)
    body = []
    for method in COLOURS:
        if (method, "before") in ranks:
            shown = [f"{statistics.fmean(ranks[method, stage]):.1f}" for stage in ("before", "after")]
            body.append(
                [f"`{method}`" if " " not in method else "`gradient_stability`, while training", *shown]
            )
    return _table([f"mean rank over {cells} cells", "pruned", "tuned"], body)


def _mended(measured: Mapping[str, Rows]) -> str:
    """What compensation does with the first seed, where all criteria were measured: mean over all but random."""
    body = []
    for net, every in measured.items():
        rows = {key: row for key, row in every.items() if key.startswith("0|")}
        for share in _shares(rows, "layer"):
            columns = []
            for what in ("before", "bias", "least_squares", "after", "least_squares, after"):
                means = [
                    statistics.fmean(values)
                    for method in COLOURS
                    if method != "random" and (values := _values(rows, method, "layer", share, what))
                ]
                columns.append(_shown(means))
            random = _shown(_values(rows, "random", "layer", share, "least_squares"))
            if random != "-":
                body.append([net, f"{100 * share:.0f} %", *columns, random])
    head = ["net", "MACs", "pruned", "`bias`", "`least_squares`", "tuned", "`least_squares`, tuned"]
    return _table([*head, "random units, `least_squares`"], body)


def _by_the_mean(measured: Mapping[str, Rows]) -> str:
    """Scope global with raw scores, with scores over their layer's mean, and scope layer, before tuning."""
    rows = measured["digits-mlp"]
    scopes = ("layer", "global", "global, by the mean")
    shares = _shares(rows, scopes[2])
    head = ["criterion", *(f"{100 * share:.0f} %, {scope}" for share in shares[1:3] for scope in scopes)]
    body = []
    for method in COLOURS:
        cells = [
            _shown(_values(rows, method, scope, share, "before")) for share in shares[1:3] for scope in scopes
        ]
        if method != "random":
            body.append(
                [f"`{method}`" if " " not in method else "`gradient_stability`, while training", *cells]
            )
    return _table(head, body)


def _drawing(net: str, rows: Rows) -> str:
    """Two panels, pruned and tuned, over the share of MACs that is left; bars reach from the least to the most."""
    wide = _LEFT + 2 * _PANEL[0] + _GAP + 12
    high = _TOP + _PANEL[1] + _BOTTOM + 62
    shares = _shares(rows, "layer")
    points = {
        (stage, method): [
            (share, values) for share in shares if (values := _values(rows, method, "layer", share, stage))
        ]
        for stage in ("before", "after")
        for method in COLOURS
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    for index, (stage, title) in enumerate((("before", "pruned"), ("after", "pruned and fine-tuned"))):
        left = _LEFT + index * (_PANEL[0] + _GAP)
        drawn = [points[stage, method] for method in COLOURS]
        every = [value for line in drawn for _, values in line for value in values] + _base(rows)
        low, top = min(every), max(every)
        low, top = low - 0.04 * (top - low), top + 0.04 * (top - low)
        parts += _panel(left, f"{net}: {title}", shares, (low, top), statistics.fmean(_base(rows)))
        lines = {method: points[stage, method] for method in COLOURS if points[stage, method]}
        for place, (method, line) in enumerate(lines.items()):
            shift = 3.0 * (place - (len(lines) - 1) / 2)
            parts += _line(line, COLOURS[method], left + shift, shares, (low, top))
    named = [method for method in COLOURS if points["before", method]]
    for place, method in enumerate(named):
        x, y = _LEFT + (place % 3) * 250, _TOP + _PANEL[1] + _BOTTOM + 12 + 18 * (place // 3)
        name = method if " " not in method else "gradient_stability, while training"
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{COLOURS[method]}"/>')
        parts.append(f'<text x="{x + 9}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _x(share: float, shares: Sequence[float]) -> float:
    """Shares stand side by side at equal distances."""
    return _PANEL[0] * (0.5 + shares.index(share)) / len(shares)


def _y(value: float, limits: tuple[float, float]) -> float:
    return _TOP + _PANEL[1] * (limits[1] - value) / (limits[1] - limits[0])


def _panel(
    left: float, title: str, shares: Sequence[float], limits: tuple[float, float], base: float
) -> list[str]:
    bottom = _TOP + _PANEL[1]
    parts = [
        f'<text x="{left}" y="{_TOP - 12}" font-weight="bold">{escape(title)}</text>',
        f'<rect x="{left}" y="{_TOP}" width="{_PANEL[0]}" height="{_PANEL[1]}" fill="none" stroke="#999"/>',
        f'<line x1="{left}" x2="{left + _PANEL[0]}" y1="{_y(base, limits):.1f}" y2="{_y(base, limits):.1f}" '
        'stroke="#333" stroke-dasharray="4 3"/>',
        f'<text x="{left + _PANEL[0] / 2}" y="{bottom + 34}" text-anchor="middle">MACs left</text>',
    ]
    for share in shares:
        x = left + _x(share, shares)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{100 * share:.0f} %</text>')
    step = next(one for one in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if (limits[1] - limits[0]) / one <= 9)
    tick = math.ceil(limits[0] / step) * step
    while tick <= limits[1] + 1e-9:
        y = _y(tick, limits)
        shown = f"{100 * tick:.0f} %" if base <= 1 else f"{tick:.1f}"
        parts.append(f'<line x1="{left - 4}" x2="{left}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
        tick += step
    return parts


def _line(
    line: Sequence[tuple[float, Sequence[float]]],
    colour: str,
    left: float,
    shares: Sequence[float],
    limits: tuple[float, float],
) -> list[str]:
    places = [(left + _x(share, shares), _y(statistics.fmean(values), limits)) for share, values in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="0.6"/>']
    for (x, y), (_, values) in zip(places, line, strict=True):
        top, bottom = _y(max(values), limits), _y(min(values), limits)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    return parts
