"""The HTML page: well-formed, self-contained, escaped, complete, the same for the same run."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fleetpress.jobs.figures import MISSING
from fleetpress.jobs.report import render_html
from fleetpress.jobs.results import FleetResult, ModelResult

TIMES = "\N{MULTIPLICATION SIGN}"
EVIL = "<script>alert('x')</script>"
VOID = {"meta", "br", "link", "img", "hr", "input"}
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
)
GPT = ModelResult(
    name="gpt",
    state="rejected",
    reason="perplexity went from 24.3100 to 26.5000",
    before={"metric": "perplexity", "value": 24.31, "bytes": 4_000_000},
    after={"metric": "perplexity", "value": 26.5, "bytes": 1_000_000},
    compression_ratio=4.0,
    bits_per_weight=5.5,
)
BROKEN = ModelResult(name=f"broken{EVIL}", state="failed", reason=f'truncated {EVIL} & "quoted"')
RESULT = FleetResult(
    run="20250112T030001Z-1a2b3c",
    state="done",
    name=f"nightly{EVIL}",
    output=f"s3://bucket/{EVIL}",
    models=(LENET, GPT, BROKEN),
    seconds=83.4,
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


class Page(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes and text by table row."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_html(RESULT, METRICS))


def test_nothing_from_a_file_becomes_markup(page: Page) -> None:
    html = render_html(RESULT, METRICS)
    assert "script" not in page.tags
    assert EVIL not in html
    for place in (
        f"nightly{EVIL}",
        f"broken{EVIL}",
        f'truncated {EVIL} & "quoted"',
        f"s3://bucket/{EVIL}",
        f"head{EVIL}",
    ):
        assert place in page.text


def test_the_page_needs_no_network(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "form"} & page.tags
    assert not {"src", "href", "action"} & {name for name, _ in page.attributes}
    assert "url(" not in render_html(RESULT, METRICS)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_head_line(page: Page) -> None:
    text = " ".join(page.text.split())
    for part in (
        "run 20250112T030001Z-1a2b3c",
        "Models 1 of 3 1 published, 1 rejected, 1 failed",
        "252 kB → 20.7 kB",
        f"12.2{TIMES}",
        "1 min 23 s",
    ):
        assert part in text, part


def test_every_number_of_the_fleet_is_there(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["lenet5"] == [
        *("published", "accuracy", "0.9912t", "0.9896", "0.0016"),
        *("252 kB", "20.7 kB", f"12.2{TIMES}", "4.31"),
        *("61.7k", "20.1k", "417k", "120k"),
        *("0.512", "0.301", "0.402"),
    ]
    assert rows["gpt"] == [
        *("rejected", "perplexity ↓", "24.310", "26.500", "2.1900"),
        *("4.00 MB", "1.00 MB", f"4.00{TIMES}", "5.50"),
        *[MISSING] * 7,
    ]
    assert rows[f"broken{EVIL}"] == ["failed", *[MISSING] * 15]


def test_a_column_for_every_cell(page: Page) -> None:
    assert {len(row) for row in page.rows if row[0] in ("lenet5", "gpt", f"broken{EVIL}")} == {17}


def test_exact_numbers_are_one_hover_away(page: Page) -> None:
    titles = {value for name, value in page.attributes if name == "title"}
    assert {"252,416 bytes", "20,733 bytes", "61,706", "416,520"} <= titles


def test_every_layer_is_there(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["classifier.0"] == [
        *("Linear", "7 of 21", "33.3 %", "4", "96"),
        *("192 kB", "25.2 kB", "19.8", MISSING),
    ]
    assert rows[f"head{EVIL}"] == ["Linear", *[MISSING] * 7, "prune: its units are the outputs"]
    assert "Warning: ignore 'lm_head' matches no layer" in page.text
    assert f"models/lenet5/{DIGEST}" in page.text


def test_problems_come_first(page: Page) -> None:
    text = page.text
    assert (
        text.index("perplexity went from")
        < text.index("Fleet")
        < text.index("Size left")
        < text.index("Layers")
    )


def test_bars_show_what_is_left() -> None:
    html = render_html(RESULT, METRICS)
    widths = re.findall(r'class="(part|refused)" width="([\d.]+)%"', html)
    assert widths == [("part", "8.21"), ("refused", "25.00")]


def test_a_model_that_grew_fills_its_bar() -> None:
    grown = replace(LENET, after={"bytes": 10**6})
    assert 'width="100.00%"' in render_html(replace(RESULT, models=(grown,)), {})


def test_the_largest_models_get_bars() -> None:
    models = tuple(
        ModelResult(name=f"m{i}", state="published", before={"bytes": 100 + i}, after={"bytes": 10})
        for i in range(30)
    )
    html = render_html(replace(RESULT, models=models), {})
    assert "of the 24 largest of 30 models" in html
    assert re.findall(r'class="who">(\w+)<', html) == [f"m{i}" for i in range(6, 30)]


def test_a_page_of_a_thousand_models_stays_light() -> None:
    models = tuple(
        replace(LENET, name=f"customer-{index:04}/segmentation-model-of-{index:04}") for index in range(1000)
    )
    shown = {model.name: METRICS["lenet5"] for model in models[:50]}
    html = render_html(replace(RESULT, models=models), shown)
    assert len(html.encode()) < 1_000_000
    page = Page(html)
    assert {len(row) for row in page.rows if row[0].startswith("customer-")} == {17}
    assert "Layers of the 50 largest of 1000 models" in " ".join(page.text.split())


def test_a_run_that_still_works_says_so() -> None:
    assert "so far: it is still running" in Page(render_html(replace(RESULT, state="running"), METRICS)).text
    assert "still running" not in render_html(RESULT, METRICS)


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_a_run_that_has_only_begun(state: str) -> None:
    begun = FleetResult(run="r", state=state, name="n", output="o", models=())  # type: ignore[arg-type]
    text = " ".join(Page(render_html(begun, {})).text.split())
    assert "0 of 0 none yet" in text
    assert state in text


def test_metrics_of_another_shape_are_no_crash() -> None:
    odd = replace(
        LENET, before={"metric": 7, "bytes": "many", "value": True}, after={}, compression_ratio=None
    )
    rows = Page(render_html(replace(RESULT, models=(odd,)), {"lenet5": {}})).rows
    assert next(row for row in rows if row[0] == "lenet5")[3:9] == [MISSING] * 6


def test_the_same_run_gives_the_same_page() -> None:
    assert render_html(RESULT, METRICS) == render_html(RESULT, METRICS)


def test_a_page_costs_no_torch() -> None:
    code = (
        "import sys; from fleetpress.jobs.report import render_html; from fleetpress.jobs.results import FleetResult;"
        "render_html(FleetResult(run='r', state='done', name='n', output='o', models=()), {});"
        "sys.exit(bool({'torch', 'ray', 'boto3', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
