"""A run as one self-contained HTML page: the same input gives the same page, and nothing is fetched to show it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fleetpress.storage.store import ObjectStore

from ..runs.figures import (
    LOWER_IS_BETTER,
    MISSING,
    measured,
    metric_of,
    sized,
)
from ..runs.results import (
    GOOD,
    REPORT,
    RUNS,
    SPEC,
    FleetResult,
    ModelResult,
    number,
    write_summary,
)
from .comparison import MEANINGS, Comparison, compare
from .fleet_table import columns, listed, row
from .headline import headline, told_versions
from .layers import layer_rows
from .material import Material, gather
from .problems import problems
from .scatter import scatter
from .searches import searches
from .template import began_at, render
from .timeline import draw, read_events

_OPEN_PROBLEMS = 8  # more of them are folded away: what follows must be found, too
_OPEN_CHANGES = 8
_TOLD_CHANGES = 200
_TOLD_NAMES = 40
_MOST_SPEC_SIGNS = 64_000
# What is told of each, and under what the script sorts it: key, group, label, explanation.
_COLUMNS = (
    ("name", "", "Model", ""),
    ("state", "", "State", ""),
    ("change", "", "Since last run", ""),
    ("metric", "Metric", "name", "↓ means lower is better"),
    ("before", "Metric", "before", "the metric of the original model on the eval data"),
    ("after", "Metric", "after", "the metric of the compressed model on the eval data"),
    ("drop", "Metric", "drop", "how much worse it became, in its own unit; a minus sign means better"),
    ("used", "Metric", "of accepted", "the drop as a share of the one that the recipe accepts"),
    ("bytes_before", "Stored bytes", "before", "all files of the original"),
    ("bytes_after", "Stored bytes", "after", "all files of the artifact"),
    ("ratio", "Stored bytes", "ratio", "bytes before / bytes after"),
    ("bits", "Stored bytes", "bits/weight", "stored bits per weight, scales and zero points counted"),
)


def page_of(store: ObjectStore, result: FleetResult) -> str:
    """The page of a run in the output at `store`, made of what the output holds of it."""
    return render_html(result, gather(store, result))


def write_end(store: ObjectStore, result: FleetResult, material: Material | None = None) -> None:
    """Write down how a run ended: its page, and then the summary, which says that it is over."""
    page = render_html(result, gather(store, result) if material is None else material)
    store.put(f"{RUNS}{result.run}/{REPORT}", page.encode())
    write_summary(store, result)


def render_html(result: FleetResult, material: Material) -> str:
    """The page of a run. Every value is escaped: names and reasons come from files and servers."""
    happened = read_events(material.events, result.seconds, running=result.state == "running")
    comparison = compare(result, material.previous)
    models = listed(result.models)
    rows = {model.name: index for index, model in enumerate(models)}
    found = problems(result, comparison)
    compared = comparison.before is not None
    spec = material.spec_text or ""
    return render(
        "page",
        scripted=True,
        result=result,
        began=began_at(result.run),
        head=headline(result, happened),
        problems=found[:_OPEN_PROBLEMS],
        more_problems=found[_OPEN_PROBLEMS:],
        regressions=len(comparison.names("regressed")),
        comparison=comparison,
        changes=_change_counts(comparison),
        change_rows=_change_rows(result, comparison),
        open_changes=_OPEN_CHANGES,
        told_changes=_TOLD_CHANGES,
        told_names=_TOLD_NAMES,
        meanings=MEANINGS,
        columns=[column for column in _COLUMNS if compared or column[0] != "change"],
        groups=_groups([column for column in _COLUMNS if compared or column[0] != "change"]),
        models=[
            (model.name, row(model, comparison.changes.get(model.name, "") if compared else None))
            for model in models
        ],
        states=sorted({model.state for model in models}),
        lower=any(metric_of(model) in LOWER_IS_BETTER for model in models),
        retrained=any((model.before or {}).get("stage") == "trained" for model in models),
        scatter=scatter(models, rows),
        searches=searches(material.layers),
        timeline=draw(happened),
        data=_data(models, comparison, happened, material, rows),
        layered=len(material.layers),
        layered_of=sum(model.digest is not None for model in result.models),
        spec=spec[:_MOST_SPEC_SIGNS],
        spec_cut=len(spec) > _MOST_SPEC_SIGNS,
        spec_key=f"{RUNS}{result.run}/{SPEC}",
        versions=told_versions(result),
    )


def _groups(shown: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, int]]:
    """Headings above the columns, and over how many of them each goes."""
    groups: list[tuple[str, int]] = []
    for _, group, _, _ in shown:
        if group and groups and groups[-1][0] == group:
            groups[-1] = group, groups[-1][1] + 1
        else:
            groups.append((group, 1))
    return groups


def _change_counts(comparison: Comparison) -> list[tuple[str, int]]:
    found = [(change, len(comparison.names(change))) for change in MEANINGS]
    return [*((change, number) for change, number in found if number)]


def _change_rows(result: FleetResult, comparison: Comparison) -> list[dict[str, Any]]:
    """Models that are not what they were, those that matter most first: then and now."""
    told = ("recovered", "changed", "new")  # what has regressed stands above
    now = {model.name: model for model in result.models}
    found = []
    for change in told:
        for name in comparison.names(change):  # type: ignore[arg-type]
            earlier = comparison.earlier.get(name)
            found.append(
                {"name": name, "change": change, "then": earlier and _told(earlier), "now": _told(now[name])}
            )
    return found


def _told(model: ModelResult) -> dict[str, str]:
    good = model.state in GOOD
    return {
        "state": model.state,
        "bytes": sized(number(model.after, "bytes")) if good else MISSING,
        "value": measured(number(model.after, "value")),
    }


def _data(
    models: Sequence[ModelResult],
    comparison: Comparison,
    happened: Any,
    material: Material,
    rows: Mapping[str, int],
) -> Markup:
    """What the script needs, as JSON that cannot end the element it stands in."""
    layers = {rows[name]: its for name, its in layer_rows(material.layers).items() if name in rows}
    value = {**columns(models, comparison, happened.by_model), "layers": layers}
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
