"""Points, layers and rows: where things are drawn, and what is left out of what is too much."""

import math
from dataclasses import replace

import pytest

from fleetpress.jobs.report.layers import MOST_LAYERS, layer_rows, relative_error
from fleetpress.jobs.report.scatter import scatter
from fleetpress.jobs.runs.results import ModelResult

MODEL = ModelResult(
    name="m",
    state="published",
    before={"metric": "accuracy", "value": 0.9, "bytes": 800},
    after={"metric": "accuracy", "value": 0.895, "bytes": 100},
    max_drop=0.01,
)


def value(model: ModelResult, after: float, name: str = "m") -> ModelResult:
    return replace(model, name=name, after={**(model.after or {}), "value": after})


def test_the_accepted_drop_is_a_line() -> None:
    models = (value(MODEL, 0.9, "same"), value(MODEL, 0.89, "just"), value(MODEL, 0.895, "half"))
    found = scatter(models, {"same": 0, "just": 1, "half": 2})
    assert found is not None
    same, just, half = found.points
    assert same.y == found.zero
    assert just.y == pytest.approx(found.gate, abs=0.01)
    assert half.y == pytest.approx((same.y + just.y) / 2, abs=0.02)
    assert same.x == just.x


def test_lower_is_better_for_some_metrics() -> None:
    model = replace(
        MODEL,
        before={"metric": "perplexity", "value": 20.0, "bytes": 8},
        after={"metric": "perplexity", "value": 20.5, "bytes": 1},
        max_drop=1.0,
    )
    found = scatter((model,), {"m": 0})
    assert found is not None
    assert found.gate is not None
    assert found.zero < found.points[0].y < found.gate


def test_smaller_is_to_the_right() -> None:
    small = replace(MODEL, name="small", after={**(MODEL.after or {}), "bytes": 10})
    found = scatter((MODEL, small), {"m": 0, "small": 1})
    assert found is not None
    assert found.points[0].x < found.points[1].x
    assert {label for _, label in found.x_ticks} >= {"10\N{MULTIPLICATION SIGN}"}


def test_a_collapsed_model_is_drawn_at_the_edge() -> None:
    models = (MODEL, value(MODEL, 0.1, "gone"), value(MODEL, 0.99, "risen"))
    found = scatter(models, {"m": 0, "gone": 1, "risen": 2})
    assert found is not None
    assert [point.outside for point in found.points] == ["", "below", "above"]
    assert 90 < found.points[1].y <= 100
    assert 0 <= found.points[2].y < 10
    assert (found.below, found.above) == (1, 1)
    none_accepted = scatter((replace(MODEL, max_drop=0.0),), {"m": 0})
    assert none_accepted is not None
    assert none_accepted.points[0].outside == "below"


def test_what_was_not_measured_is_counted() -> None:
    others = (
        ModelResult(name="failed", state="failed"),
        replace(MODEL, name="nan", after={"value": math.nan, "bytes": 1}),
        replace(MODEL, name="empty", after={"value": 1.0, "bytes": 0}),
    )
    found = scatter((MODEL, *others), {"m": 0, "failed": 1, "nan": 2, "empty": 3})
    assert found is not None
    assert (len(found.points), found.undrawn) == (1, 3)
    assert scatter(others, {}) is None


def test_runs_of_older_versions_tell_no_accepted_drop() -> None:
    found = scatter((replace(MODEL, max_drop=None),), {"m": 0})
    assert found is not None
    assert found.gate is None
    assert found.points[0].y > found.zero


def test_names_do_not_cover_each_other() -> None:
    few = [value(MODEL, 0.9 - 0.001 * index, f"model-{index}") for index in range(9)]
    rows = {model.name: index for index, model in enumerate(few)}
    found = scatter(few, rows)
    assert found is not None
    assert any(point.label for point in found.points)
    many = [value(MODEL, 0.9, f"model-{index}") for index in range(40)]
    crowded = scatter(many, {model.name: index for index, model in enumerate(many)})
    assert crowded is not None
    assert not any(point.label for point in crowded.points)


def test_a_layer_is_a_row_of_text() -> None:
    layer = {
        "name": "fc",
        "kind": "Linear",
        "sparsity": 0.333333,
        "removed_units": list(range(7)),
        "num_bits": 4,
        "group_size": 96,
        "bytes_before": 192_000,
        "bytes_after": 25_200,
        "sqnr_db": 20.0,
        "skipped": None,
    }
    found = layer_rows({"m": {"layers": [layer, {"name": "head", "skipped": "why"}], "warnings": ["w"]}})["m"]
    assert found["layers"] == [
        ["fc", "Linear", "7 of 21", "33.3 %", "4", "96", "192 kB", "25.2 kB", "20.0", "10.0 %", ""],
        ["head", "", "", "", "", "", "", "", "", "", "why"],
    ]
    assert (found["of"], found["warnings"]) == (2, ["w"])


def test_of_very_many_layers_the_largest_are_kept_in_their_order() -> None:
    layers = [{"name": str(index), "bytes_before": index % 1000} for index in range(2000)]
    found = layer_rows({"m": {"layers": layers}})["m"]
    assert found["of"] == 2000
    assert len(found["layers"]) == MOST_LAYERS
    names = [int(layer[0]) for layer in found["layers"]]
    assert names == sorted(names)
    assert min(name % 1000 for name in names) >= 850
    fleet = layer_rows({str(index): {"layers": layers} for index in range(50)})
    assert sum(len(its["layers"]) for its in fleet.values()) <= 4000


@pytest.mark.parametrize(
    ("decibels", "error"),
    [(20.0, "10.0 %"), (40.0, "1.00 %"), (0.0, "100 %"), (1e9, "0 %"), (math.inf, "0 %")],
)
def test_decibels_as_a_relative_error(decibels: float, error: str) -> None:
    assert relative_error(decibels) == error
