"""Size against accuracy: a point for every measured model, with the drop that its recipe accepts as a line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..runs.figures import lost, three_digits
from ..runs.results import ModelResult, number

_LABELLED = 14  # more names than that cover each other
_LONGEST_LABEL = 24
# Where a name may stand: right of its point, left, above, below; how far, which end of it, and its share to the left.
_SIDES = ((10, 4, "start", 0.0), (-10, 4, "end", -1.0), (0, -10, "middle", -0.5), (0, 20, "middle", -0.5))
_PIXELS = (680.0, 300.0)  # about the size of the drawing, to keep names apart
_LOWEST, _HIGHEST = -3.0, 1.5  # in accepted drops; what is beyond is drawn at the edge
_LEAST_RATIO, _MOST_RATIO = 0.5, 4096.0
_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A name beside its point: how far from it in pixels, and which end of the text lies there."""

    text: str
    dx: int
    dy: int
    anchor: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A model: its row in the table, and its place in % from the upper left; `outside` is where it really lies."""

    row: int
    x: float
    y: float
    state: str
    outside: Literal["", "above", "below"]
    label: Label | None = None


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """`gate` is where the accepted drop lies in %, None if no summary tells it (runs of older versions)."""

    points: Sequence[Point]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    gate: float | None
    zero: float
    undrawn: int
    above: int
    below: int
    dense: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    row: int
    name: str
    state: str
    ratio: float
    change: float


def scatter(models: Sequence[ModelResult], rows: Mapping[str, int]) -> Scatter | None:
    """Compression ratio to the right (logarithmic), accuracy upwards, in units of the drop that is accepted.

    So models of all metrics share one drawing: 0 is as good as before, -1 just accepted. `rows` are those of the table
    by name. None if no model was measured.
    """
    accepted = any(model.max_drop is not None for model in models)
    found = [place for model in models if (place := _place(model, rows, accepted=accepted)) is not None]
    if not found:
        return None
    low = max(_LOWEST, min(-1.3 if accepted else -0.01, *(place.change for place in found), 0.0))
    high = min(_HIGHEST, max(0.4 if accepted else 0.01, *(place.change for place in found), 0.0))
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    left, right = _span([place.ratio for place in found])

    def x_of(ratio: float) -> float:
        return round(100 * (math.log(ratio) - left) / (right - left), 2)

    def y_of(change: float) -> float:
        return round(100 * (high - min(max(change, low), high)) / (high - low), 2)

    points = [
        Point(
            row=place.row,
            x=x_of(place.ratio),
            y=y_of(place.change),
            state=place.state,
            outside="above" if place.change > high else "below" if place.change < low else "",
        )
        for place in found
    ]
    return Scatter(
        points=_labelled(points, [place.name for place in found]),
        x_ticks=[(x_of(ratio), f"{ratio:g}{_TIMES}") for ratio in _ratios(math.exp(left), math.exp(right))],
        y_ticks=[(y_of(value), _percent(value)) for value in _steps(low, high)],
        gate=y_of(-1.0) if accepted else None,
        zero=y_of(0.0),
        undrawn=len(models) - len(found),
        above=sum(point.outside == "above" for point in points),
        below=sum(point.outside == "below" for point in points),
        dense=len(points) > 400,
    )


def _span(ratios: Sequence[float]) -> tuple[float, float]:
    """Logarithms of the smallest and the largest ratio of the drawing, with room around the points."""
    low, high = math.log(min(ratios)), math.log(max(ratios))
    room = 0.08 * (high - low) + max(0.0, math.log(3) - (high - low)) / 2
    return low - room, high + room


def _place(model: ModelResult, rows: Mapping[str, int], *, accepted: bool) -> _Place | None:
    before, after = number(model.before, "bytes"), number(model.after, "bytes")
    drop = lost(model)
    if before is None or after is None or drop is None or model.name not in rows:
        return None
    if not (0 < before < math.inf and 0 < after < math.inf and math.isfinite(drop)):
        return None
    unit = model.max_drop if accepted else abs(number(model.before, "value") or 0.0)
    if unit is None or not 0 <= unit < math.inf:
        return None
    change = -drop / unit if unit else -math.copysign(math.inf, drop) if drop else 0.0
    ratio = min(max(before / after, _LEAST_RATIO), _MOST_RATIO)
    return _Place(row=rows[model.name], name=model.name, state=model.state, ratio=ratio, change=change)


def _labelled(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """Names beside the points of a small fleet, where they cover neither each other nor another point."""
    if len(points) > _LABELLED:
        return list(points)
    centers = [(point.x / 100 * _PIXELS[0], point.y / 100 * _PIXELS[1]) for point in points]
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y in centers]
    found = []
    for point, name, (x, y) in zip(points, names, centers, strict=True):
        text = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"
        label = None
        for dx, dy, anchor, left in _SIDES:
            width = 7.0 * len(text)
            start, top = x + dx + left * width, y + dy - 12
            box = (start, start + width, top, top + 15)
            if (
                start >= 0
                and start + width <= _PIXELS[0]
                and top >= -4
                and not any(_overlap(box, other) for other in taken)
            ):
                taken.append(box)
                label = Label(text=text, dx=dx, dy=dy, anchor=anchor)
                break
        found.append(replace(point, label=label))
    return found


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _ratios(low: float, high: float) -> list[float]:
    """Some four to eight round ratios between the two."""
    for digits in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    ):
        found = [
            digit * 10.0**power
            for power in range(-1, 4)
            for digit in digits
            if low <= digit * 10.0**power <= high
        ]
        if len(found) >= 4:
            break
    return found


def _steps(low: float, high: float) -> list[float]:
    """Round values of which some six fit."""
    step = next(
        step
        for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
        if (high - low) / step <= 9
    )
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _percent(value: float) -> str:
    if abs(value) < 1e-9:
        return "0"
    sign = "+" if value > 0 else "\N{MINUS SIGN}"
    shown = abs(100 * value)
    return f"{sign}{shown:.0f} %" if shown == round(shown) else f"{sign}{three_digits(shown)} %"
