"""The HTML page: well-formed, self-contained, escaped, complete, the same for the same run."""

import base64
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from example_fleets import SPEC_TEXT, VERSIONS, events, fleet, layers, material
from page_reader import Page

from fleetpress.jobs.report import Material, render_html
from fleetpress.jobs.report.fleet_table import LISTED
from fleetpress.jobs.runs.figures import MISSING
from fleetpress.jobs.runs.results import FleetResult, ModelResult

TIMES = "\N{MULTIPLICATION SIGN}"
EVIL = "<script>alert('x')</script>"
DIGEST = "0123abcd" * 8
LENET = ModelResult(
    name="lenet5",
    state="published",
    digest=DIGEST,
    before={
        "metric": "accuracy",
        "value": 0.9912,
        "stage": "trained",
        "parameters": 61_706,
        "macs": 416_520,
        "latency_ms": 0.512,
        "bytes": 252_416,
    },
    after={
        "metric": "accuracy",
        "value": 0.9896,
        "parameters": 20_132,
        "macs": 120_300,
        "latency_ms": 0.301,
        "latency_packed_ms": 0.402,
        "bytes": 20_733,
    },
    compression_ratio=12.1746,
    bits_per_weight=4.3125,
    max_drop=0.01,
)
GPT = ModelResult(
    name="gpt",
    state="rejected",
    reason="perplexity went from 24.3100 to 26.5000; use more bits",
    before={"metric": "perplexity", "value": 24.31, "bytes": 4_000_000},
    after={"metric": "perplexity", "value": 26.5, "bytes": 1_000_000},
    compression_ratio=4.0,
    bits_per_weight=5.5,
    max_drop=0.5,
)
BROKEN = ModelResult(name=f"broken{EVIL}", state="failed", reason=f'truncated {EVIL} & "quoted"')
RESULT = FleetResult(
    run="20250112T030001Z-1a2b3c",
    state="done",
    name=f"nightly{EVIL}",
    output=f"s3://bucket/{EVIL}",
    models=(LENET, GPT, BROKEN),
    seconds=83.4,
    versions=VERSIONS,
)
LAYER = {
    "name": "classifier.0",
    "kind": "Linear",
    "sparsity": 0.333333,
    "removed_units": list(range(7)),
    "num_bits": 4,
    "group_size": 96,
    "bytes_before": 192_000,
    "bytes_after": 25_200,
    "sqnr_db": 19.77,
    "skipped": None,
}
KEPT = {
    "name": f"head{EVIL}",
    "kind": "Linear",
    "sparsity": 0.0,
    "removed_units": [],
    "num_bits": None,
    "group_size": None,
    "bytes_before": None,
    "bytes_after": None,
    "sqnr_db": None,
    "skipped": "prune: its units are the outputs",
}
METRICS = {"lenet5": {"layers": [LAYER, KEPT], "warnings": ["ignore 'lm_head' matches no layer"]}}
EVENTS = [
    json.dumps({"at_seconds": at, "kind": kind, "model": "lenet5", "task": f"lenet5/{step}", **more}).encode()
    for at, kind, step, more in (
        (1.0, "started", "train", {}),
        (3.0, "retry", "train", {"text": f"lost {EVIL}"}),
        (4.0, "started", "train", {}),
        (
            9.0,
            "finished",
            "train",
            {"seconds": 5.0, "where": "node-1", "bytes_read": 1000, "bytes_written": 10},
        ),
        (9.0, "started", f"{EVIL}", {}),
    )
]
MATERIAL = Material(layers=METRICS, events=EVENTS, spec_text=f"name: {EVIL}\n")


def made(result: FleetResult = RESULT, **more: Any) -> Page:
    return Page(render_html(result, Material(**more)))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_html(RESULT, MATERIAL))


def test_nothing_from_a_file_becomes_markup(page: Page) -> None:
    html = render_html(RESULT, MATERIAL)
    assert EVIL not in html
    assert len(page.raw["script"]) == 2, "the data and the script, and no other"
    for place in (
        f"nightly{EVIL}",
        f"broken{EVIL}",
        f'truncated {EVIL} & "quoted"',
        f"s3://bucket/{EVIL}",
        f"lost {EVIL}",
        f"name: {EVIL}",
    ):
        assert place in page.text
    assert page.data["layers"]["0"]["layers"][1][0] == f"head{EVIL}"


def test_the_page_needs_no_network(page: Page) -> None:
    html = render_html(RESULT, MATERIAL)
    assert not {"link", "img", "iframe", "object", "form"} & page.tags
    assert not {"src", "action", "style", "onclick"} & {name for name, _ in page.attributes}
    assert all((value or "").startswith("#") for name, value in page.attributes if name == "href")
    assert "url(" not in html
    assert "@import" not in html


def test_the_policy_allows_its_own_style_and_script_only(page: Page) -> None:
    policy = next(
        value for name, value in page.attributes if name == "content" and value and "default-src" in value
    )
    for kind, text in (("style", page.raw["style"][0]), ("script", page.raw["script"][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_the_head_line(page: Page) -> None:
    for part in (
        "2025-01-12 03:00:01 UTC",
        "run 20250112T030001Z-1a2b3c",
        "Saved by 1 published model 91.8 %",
        f"252 kB → 20.7 kB, 12.2{TIMES} smaller: 232 kB less",
        "Models 1 of 3 1 published, 1 rejected, 1 failed",
        "Accuracy lost 0.0016 accuracy, at worst lenet5",
        "Time 1 min 23 s 7.0 s of task time",
        "Work 3 tasks 1 retry; 1.00 kB read, 10 B written",
    ):
        assert part in page.words, part


def test_every_metric_has_its_own_cost() -> None:
    other = replace(
        LENET, name="b", before={"metric": "cosine", "value": 0.5}, after={"metric": "cosine", "value": 0.75}
    )
    page = made(replace(RESULT, models=(LENET, replace(LENET, name="c"), other)))
    assert "0.0016 accuracy, at worst worst lenet5, mean 0.0016" in page.words
    assert "cosine: worst 0.2500 better, mean 0.2500 better" in page.words


def test_every_number_of_the_fleet_is_there(page: Page) -> None:
    assert page.row("lenet5") == [
        *("published", "accuracy", "0.9912t", "0.9896", "0.0016", "16 %"),
        *("252 kB", "20.7 kB", f"12.2{TIMES}", "4.31"),
    ]
    assert page.row("gpt") == [
        *("rejected", "perplexity↓", "24.310", "26.500", "2.1900", "438 %"),
        *("4.00 MB", "1.00 MB", f"4.00{TIMES}", "5.50"),
    ]
    assert page.row(f"broken{EVIL}") == ["failed", *[MISSING] * 9]
    heads = [value for name, value in page.attributes if name == "data-key"]
    assert len(heads) == 1 + len(page.row("lenet5"))


def test_what_a_model_tells_when_it_is_opened(page: Page) -> None:
    facts = page.data["facts"][0]
    assert facts[:6] == ["61.7k → 20.1k", "417k → 120k", "0.512 → 0.301 ms", "0.402 ms", "0.0100", "7.0 s"]
    assert facts[6] == "1"
    assert facts[8] == DIGEST
    assert page.data["facts"][1][9] == GPT.reason
    assert page.data["bytes_after"] == [20_733, 1_000_000, None]
    assert page.data["used"] == [pytest.approx(0.16), pytest.approx(4.38), None]


def test_exact_numbers_are_one_hover_away(page: Page) -> None:
    titles = {value for name, value in page.attributes if name == "title"}
    assert {"252,416 bytes", "20,733 bytes"} <= titles


def test_problems_come_first_with_their_remedy(page: Page) -> None:
    assert (
        page.words.index("perplexity went from 24.3100 to 26.5000 What helps: use more bits")
        < page.words.index("Size and accuracy every")
        < page.words.index("Drop: how much worse")
        < page.words.index("Timeline 3 tries")
        < page.words.index("The exact spec")
    )


def test_spec_and_versions(page: Page) -> None:
    assert "fleetpress 0.3.0 python 3.11.7 ray 2.60.0 torch 2.13.0" in page.words
    assert SPEC_TEXT in made(spec_text=SPEC_TEXT).text
    old = made(replace(RESULT, versions={}))
    assert "did not write down its versions" in old.words
    assert "did not keep its spec" in old.words
    assert "the rest is in runs/" in made(spec_text="# x\n" * 40_000).words


def test_warnings_are_told() -> None:
    assert "Warnings two runs at once" in made(replace(RESULT, warnings=("two runs at once",))).words


def test_without_a_run_before_nothing_is_new(page: Page) -> None:
    assert "Since" not in page.words
    assert "change" not in {value for name, value in page.attributes if name == "data-key"}


def test_a_regression_stands_on_top() -> None:
    before = replace(
        RESULT, models=(LENET, replace(GPT, state="published", digest="d"), LENET), run="earlier"
    )
    page = made(replace(RESULT, models=(BROKEN, LENET, GPT)), previous=before)
    assert "Problems 2, 1 regression first" in page.words
    assert page.words.index("gpt rejected; it was published in the run before") < page.words.index(
        "truncated"
    )
    assert "Since the last run earlier 1 regressed 1 new 1 unchanged" in page.words
    assert page.row("gpt")[1] == "regressed"


def test_a_page_of_a_thousand_models_stays_light() -> None:
    result = fleet(1000)
    models = tuple(
        replace(model, name=f"customer-{index:04}-segmentation-model-of-{index:04}")
        for index, model in enumerate(result.models)
    )
    result = replace(result, models=models)
    html = render_html(result, material(result, layer_count=500))
    assert len(html.encode()) < 2_000_000
    page = Page(html)
    assert len(page.data["facts"]) == 1000
    assert len(page.data["layers"]) == 50
    assert page.data["layers"][min(page.data["layers"])]["of"] == 500
    assert "kept for the 50 largest" in page.words


def test_of_very_many_models_problems_and_the_largest_are_listed() -> None:
    models = [
        ModelResult(
            name=f"m{index}", state="published", digest="d", before={"bytes": index}, after={"bytes": 1}
        )
        for index in range(LISTED + 5)
    ]
    models[3] = ModelResult(name="m3", state="failed", reason="why")
    result = replace(RESULT, models=tuple(models))
    page = made(result)
    names = [row[0] for row in page.rows if len(row) == 11 and row[0].startswith("m")]
    assert len(names) == LISTED
    assert names[:2] == ["m3", "m6"]
    assert "The 10,000 models of 10,005 that are listed" in page.words


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_a_run_that_has_only_begun(state: str) -> None:
    begun = FleetResult(run="r", state=state, name="n", output="o", models=())  # type: ignore[arg-type]
    text = made(begun).words
    assert "0 of 0 none yet" in text
    assert "nothing yet" in text
    assert state in text


def test_metrics_of_another_shape_are_no_crash() -> None:
    odd = replace(
        LENET,
        before={"metric": [7], "bytes": "many", "value": True, "stage": {}},
        after={},
        compression_ratio=None,
        max_drop=float("nan"),
    )
    html = {
        "layers": [7, {"name": 1, "removed_units": "x", "sqnr_db": float("inf"), "bytes_before": []}],
        "warnings": 1,
    }
    page = Page(render_html(replace(RESULT, models=(odd,)), Material(layers={"lenet5": html, "other": {}})))
    assert page.row("lenet5")[1:8] == [MISSING] * 7
    assert page.data["layers"]["0"]["of"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, 0, -5])
def test_numbers_beyond_reason_are_no_crash(value: float) -> None:
    odd = replace(
        LENET,
        before={"metric": "accuracy", "bytes": value, "value": value},
        after={"bytes": value, "value": 0.5},
        compression_ratio=value,
        bits_per_weight=value,
        max_drop=value,
    )
    made(replace(RESULT, models=(odd, LENET), seconds=1.0))


def test_the_same_run_gives_the_same_page() -> None:
    result = fleet(60)
    assert render_html(result, material(result)) == render_html(fleet(60), material(fleet(60)))


def test_a_run_of_an_older_version_has_its_page() -> None:
    result = replace(
        fleet(40), versions={}, models=tuple(replace(model, max_drop=None) for model in fleet(40).models)
    )
    page = made(result, layers={"x": layers(1)}, events=events(result, told=False))
    assert "did not write down what drop" in page.words
    assert "The run did not say where its tasks ran" in page.words


def test_a_page_costs_no_torch() -> None:
    code = (
        "import sys; from fleetpress.jobs.report import Material, render_html, render_runs;"
        "from fleetpress.jobs.runs.results import FleetResult;"
        "render_html(FleetResult(run='r', state='done', name='n', output='o', models=()), Material());"
        "render_runs('o', []);"
        "sys.exit(bool({'torch', 'ray', 'boto3', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
