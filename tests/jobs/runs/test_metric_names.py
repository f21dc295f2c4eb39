"""The names of metrics: by convention, and the same in the code, the docs and the dashboard."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.runs.metric_names import (
    RUN_METRICS,
    RunMetric,
    markdown_table,
)

DOCS = Path(__file__).parents[3] / "docs"
DASHBOARD = DOCS / "grafana-dashboard.json"


@pytest.mark.parametrize("metric", RUN_METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_convention(metric: RunMetric) -> None:
    assert re.fullmatch(r"fleetpress(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    for unit in ("seconds", "bytes"):  # base units, last but for the total
        if unit in metric.name:
            assert metric.name.removesuffix("_total").endswith(f"_{unit}")


def test_the_docs_have_the_table_of_the_code() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    told = text.partition("<!-- metrics -->\n")[2].partition("\n<!-- /metrics -->")[0]
    assert told == markdown_table()


def queries(dashboard: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [
        one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"
    ]


def test_the_dashboard_uses_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    known = {metric.exported: metric for metric in RUN_METRICS}
    used = set()
    for query in queries(dashboard):
        for name in re.findall(r"ray_\w+", query):
            metric = known[name.removesuffix("_bucket") if name not in known else name]
            assert name.endswith("_bucket") == (metric.kind == "histogram"), name
            used.add(metric.exported)
        for labels in re.findall(r"by \(([^)]*)\)", query):
            allowed = {"le", *(label for name in known.values() for label in name.labels)}
            assert set(labels.split(", ")) <= allowed
    assert used == set(known)


def test_the_dashboard_can_be_imported() -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    dashboard = json.loads(text)
    assert text == json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {one["name"] for one in dashboard["templating"]["list"]}
    assert {name.strip("{}") for name in re.findall(r"\$(\w+|\{\w+\})", text)} <= variables
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
