"""What `auto` tried: a drawing for every model that was searched, its Pareto front, and what was backed off from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..runs.figures import (
    counted,
    sized,
    three_digits,
)
from ..runs.results import number

MOST_SEARCHES = 12
_WIDEST, _NARROWEST = 2.0, 1.05  # how far trials lie apart at least, as a factor of their cost
_UNITS = {"bytes": sized, "macs": counted, "latency_ms": three_digits}


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """A trial: its place in % from the lower left, what it was, and what is shown when one points at it."""

    x: float
    y: float
    look: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """The trials of one model. `line` joins those on the Pareto front; `limit` is the accepted drop, `budget` a cost.

    Places are in %, from the left and from below.
    """

    model: str
    goal: str
    dots: Sequence[Dot]
    line: Sequence[tuple[float, float, float, float]]
    limit: float | None
    budget: float | None
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    chosen: str
    steps: str
    backed_off: Sequence[tuple[str, str]]


def searches(metrics: Mapping[str, Mapping[str, Any]]) -> list[Search]:
    """Drawings of the searches that metrics.json of the models tell of, in their order; nothing for other models."""
    found = (_search(name, its.get("search")) for name, its in metrics.items())
    return [search for search in found if search is not None][:MOST_SEARCHES]


def _search(model: str, told: object) -> Search | None:
    if not isinstance(told, Mapping) or not isinstance(told.get("trials"), list):
        return None
    cost = told.get("cost")
    trials = [trial for trial in told["trials"] if isinstance(trial, Mapping) and _is_drawn(trial, cost)]
    if cost not in _UNITS or not trials:
        return None
    unit = _UNITS[cost]
    costs = [trial[cost] for trial in trials]
    limit, budget = number(told, "limit"), number(told, "budget")
    x_of = _scale(_logarithms(costs + ([budget] if budget else [])))
    drops = [*(trial["drop"] for trial in trials), 0.0, *([limit] if limit is not None else [])]
    room = 0.06 * ((max(drops) - min(drops)) or 1.0)
    y_of = _scale((min(drops) - room, max(drops) + room))
    front = sorted((trial for trial in trials if trial.get("on_front")), key=lambda trial: trial[cost])
    spots = [(x_of(math.log(trial[cost])), y_of(trial["drop"])) for trial in front]
    taken = next((trial for trial in trials if trial.get("is_chosen")), None)
    return Search(
        model=model,
        goal=str(told.get("goal", "")).replace("_", " "),
        dots=[
            Dot(
                x=x_of(math.log(trial[cost])),
                y=y_of(trial["drop"]),
                look="chosen" if trial is taken else "kept" if trial.get("is_good") else "missed",
                title=_title(trial, unit(trial[cost])),
            )
            for trial in trials
        ],
        line=[(*left, *right) for left, right in pairwise(spots)],
        limit=None if limit is None else y_of(limit),
        budget=None if budget is None else x_of(math.log(budget)),
        x_ticks=[(x_of(math.log(value)), unit(value)) for value in _spread(min(costs), max(costs))],
        y_ticks=[(y_of(value), three_digits(value)) for value in sorted({0.0, max(drops)})],
        chosen="" if taken is None else _title(taken, unit(taken[cost])),
        steps=_steps(told.get("recipe")),
        backed_off=[
            (_steps(item.get("recipe")), str(item.get("why", "")))
            for item in told.get("backed_off", ())
            if isinstance(item, Mapping)
        ],
    )


def _is_drawn(trial: Mapping[str, Any], cost: object) -> bool:
    at, drop = number(trial, str(cost)), number(trial, "drop")
    return at is not None and 0 < at < math.inf and drop is not None and math.isfinite(drop)


def _title(trial: Mapping[str, Any], shown: str) -> str:
    spread = number(trial, "standard_error") or 0.0
    return f"{trial.get('family', '')}: {shown}, drop {three_digits(trial['drop'])} ± {three_digits(spread)}"


def _steps(recipe: object) -> str:
    """A recipe in a line: what was deleted, zeroed, trained again, and the bits of its layers."""
    if not isinstance(recipe, Mapping):
        return ""
    found = []
    prune, tune, quantize = (recipe.get(name) for name in ("prune", "finetune", "quantize"))
    if isinstance(prune, Mapping):
        found.append(f"prune by {prune.get('method')}, {_shares(prune)}")
        if isinstance(zeros := prune.get("zeros"), Mapping):
            found.append(f"zeros, {_shares(zeros)}")
    if isinstance(tune, Mapping):
        found.append(f"fine-tune {tune.get('epochs')} epochs")
    if isinstance(quantize, Mapping):
        layers = quantize.get("layers")
        bits = [item.get("num_bits") for item in layers.values()] if isinstance(layers, Mapping) else []
        known = sorted(value for value in bits if isinstance(value, int))
        own = f"{_span(known)} bits, layer by layer" if known else quantize.get("scheme")
        found.append(f"quantize to {own or str(quantize.get('num_bits')) + ' bits'}")
    return ", ".join(found)


def _shares(step: Mapping[str, Any]) -> str:
    """The share that a step takes, or those of single layers."""
    layers = step.get("layers")
    own = [number(item, "sparsity") for item in layers.values()] if isinstance(layers, Mapping) else []
    known = sorted(value for value in own if value is not None)
    if not known:
        return str(step.get("sparsity"))
    return f"{_span([float(f'{value:.2g}') for value in known])}, layer by layer"


def _span(values: Sequence[float]) -> str:
    """From the first to the last of sorted values; one where they are the same."""
    low, high = values[0], values[-1]
    return f"{low}" if low == high else f"{low} to {high}"


def _logarithms(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log(min(values)), math.log(max(values))
    room = 0.06 * (high - low) + (0.3 if high - low < math.log(_WIDEST) else 0.0)
    return low - room, high + room


def _scale(ends: tuple[float, float]) -> Any:
    low, high = ends
    return lambda value: round(100 * (value - low) / (high - low), 2)


def _spread(low: float, high: float) -> list[float]:
    """The ends, and what lies between them if they are far apart."""
    if high / low < _NARROWEST:
        return [low]
    return [low, math.sqrt(low * high), high] if high / low > _WIDEST else [low, high]
