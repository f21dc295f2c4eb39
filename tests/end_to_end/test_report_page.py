"""The report page in a real browser: sorting, filtering, opening a model, dark and narrow, silent and offline."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks" / "report"), str(ROOT / "tests" / "jobs" / "report")]

from browser import Browser, NoBrowser, Page, find_browser  # noqa: E402
from example_fleets import fleet, layers, material, names_by  # noqa: E402

from fleetpress.jobs.report import Material, render_html, render_runs  # noqa: E402
from fleetpress.jobs.runs.figures import MISSING  # noqa: E402
from fleetpress.jobs.runs.results import FleetResult, ModelResult  # noqa: E402
from fleetpress.jobs.runs.run_lines import RunLine  # noqa: E402

FLEET = fleet(300)  # more than a page shows at once
MANY = fleet(1000)
EVIL = '<img src=x onerror="window.pwned = 1"></script><script>window.pwned = 1</script>'
NAMES = "Array.from(document.querySelectorAll('table.fleet > tbody > tr:not(.opened) > th'), (it) => it.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    path.write_text(render_html(FLEET, material(FLEET)), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Browser, page_file: Path) -> Iterator[Page]:
    """The fleet's page; whatever a test does, it says nothing on the console and fetches nothing."""
    found = browser.open(page_file)
    yield found
    assert found.complaints() == []
    assert found.requests() == [page_file.as_uri()]


@pytest.fixture
def page_of_many(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A page of a thousand models, as silent."""
    path = tmp_path / "report.html"
    path.write_text(render_html(MANY, material(MANY)), encoding="utf-8")
    found = browser.open(path)
    yield found
    assert found.complaints() == []
    assert found.requests() == [path.as_uri()]


def cells(page: Page, column: int) -> list[str]:
    rows = "document.querySelectorAll('table.fleet > tbody > tr:not(.opened)')"
    found: list[str] = page.run(f"Array.from({rows}, (it) => it.cells[{column}].firstChild.textContent)")
    return found


def test_a_machine_without_a_browser_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(NoBrowser, match="apt-get install chromium"):
        find_browser()


def test_the_table_sorts_by_any_column_and_says_so(page: Page) -> None:
    assert page.run(NAMES)[:2] == [model.name for model in FLEET.models[:2]]
    ratio = "th[data-key=ratio] button"
    page.click(ratio)
    ratios = [model.compression_ratio or 0.0 for model in FLEET.models]
    best = FLEET.models[ratios.index(max(ratios))].name
    assert page.run(NAMES)[0] == best
    assert page.run("document.querySelector('th[data-key=ratio]').ariaSort") == "descending"
    page.click(ratio)
    known = [value for value in ratios if value]
    assert page.run(NAMES)[0] == FLEET.models[ratios.index(min(known))].name
    assert page.run("document.querySelectorAll('th[aria-sort]').length") == 1
    page.click("th[data-key=name] button")
    assert page.run(NAMES)[:3] == sorted(model.name for model in FLEET.models)[:3]
    page.click("th[data-key=drop] button")
    page.click("th[data-key=drop] button")
    page.click("#more")
    assert cells(page, 6)[-1] == MISSING, "what is unknown comes last, however it is sorted"


def test_the_keyboard_is_enough(page: Page) -> None:
    page.run("document.querySelector('th[data-key=bytes_after] button').focus()")
    page.press("Enter")
    assert page.run("document.querySelector('th[data-key=bytes_after]').ariaSort") == "descending"
    page.run("document.querySelector('th[data-key=bits] button').focus()")
    page.press("Tab")
    first = page.run("document.activeElement.textContent")
    assert first == page.run(NAMES)[0]
    page.press("Enter")
    assert page.run("document.activeElement.ariaExpanded") == "true"
    page.press("Escape")
    assert page.run("document.activeElement.ariaExpanded") == "false"
    assert page.run("document.querySelectorAll('.opened').length") == 0


def test_names_states_and_changes_filter_and_the_count_is_announced(page_of_many: Page) -> None:
    page = page_of_many
    count = "document.getElementById('count').textContent"
    assert page.run(count) == "1,000 models"
    assert page.run("document.getElementById('count').ariaLive") == "polite"
    assert len(page.run(NAMES)) == 250, "a browser is not asked to draw everything at once"
    page.click("#find")
    page.type("CUSTOMER-03-")
    wanted = [model.name for model in MANY.models if model.name.startswith("customer-03-")]
    assert page.run(NAMES) == wanted
    assert page.run(count) == f"{len(wanted)} of 1,000 models"
    page.click("#all")
    page.click("button[data-value=rejected]")
    assert page.run("document.querySelector('button[data-value=rejected]').ariaPressed") == "true"
    assert page.run(NAMES) == names_by(MANY, ["rejected"])
    page.click("button[data-value=failed]")
    assert page.run(NAMES) == names_by(MANY, ["rejected", "failed"])
    page.click("button[data-value=regressed]")
    assert set(cells(page, 2)) == {"regressed"}
    page.click("#all")
    assert page.run(count) == "1,000 models"


def test_a_model_opens_with_its_layers(page: Page) -> None:
    name = next(model.name for model in FLEET.models if model.digest)
    page.click("table.fleet tbody th button")
    text = page.run("document.querySelector('.opened').innerText")
    assert page.run("document.querySelectorAll('.layers tbody tr').length") == 24
    assert name in page.run(NAMES)
    for part in ("Parameters", "Digest", "Accepted drop", "encoder.layers.1.attention.out_proj", "as it was"):
        assert part in text, part
    widths = page.run(
        "Array.from(document.querySelectorAll('.layers tbody tr:nth-child(2) .bar rect:last-child'), "
        "(it) => it.getAttribute('width'))"
    )
    bits, sparsity, error = (float(width.removesuffix("%")) for width in widths)
    assert (bits, sparsity) == (25.0, 25.0)
    assert 0 < error < 100
    page.click("table.fleet tbody th button")
    assert page.run("document.querySelectorAll('.opened').length") == 0


def test_problems_lead_to_their_model(page: Page) -> None:
    name = page.run("document.querySelector('#problems a').textContent")
    page.click("button[data-value=published]")
    page.click("#problems a")
    assert page.run("document.activeElement.textContent") == name
    assert "more than max_drop" in page.run("document.querySelector('.opened').innerText")
    assert page.run("document.querySelector('button[data-value=published]').ariaPressed") == "false"


def test_points_tell_their_model_and_open_it(page: Page) -> None:
    page.run("document.getElementById('points').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = page.run(
        "(() => { const box = document.querySelector('#points circle').getBoundingClientRect(); "
        "return [box.x + box.width / 2, box.y + box.height / 2] })()"
    )
    page.move_to(*box)
    assert page.run("document.getElementById('tip').hidden") is False
    tip = page.run("document.getElementById('tip').textContent").split("\n")
    assert "of the accepted drop" in tip[1]
    page.click("#points circle")
    assert page.run("document.activeElement.textContent") == tip[0]


def test_dark_is_dark_and_light_is_light(browser: Browser, page_file: Path) -> None:
    seen = []
    for dark in (False, True):
        page = browser.open(page_file, dark=dark)
        color = page.run("getComputedStyle(document.body).backgroundColor")
        seen.append(max(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))))
        assert page.complaints() == []
    assert seen[0] > 200
    assert seen[1] < 60


@pytest.mark.parametrize("width", [360, 768, 1360])
def test_nothing_sticks_out_at_the_side(browser: Browser, page_file: Path, width: int) -> None:
    page = browser.open(page_file, width=width)
    assert page.run("document.documentElement.scrollWidth") <= width


def test_it_prints(browser: Browser, tmp_path: Path) -> None:
    small = fleet(12)
    path = tmp_path / "small.html"
    path.write_text(render_html(small, material(small)), encoding="utf-8")
    assert browser.open(path).print().startswith(b"%PDF")


def test_hostile_values_stay_text(browser: Browser, tmp_path: Path) -> None:
    model = ModelResult(
        name=EVIL, state="rejected", reason=EVIL, digest=EVIL, before={"metric": EVIL, "value": 1.0}
    )
    hostile = FleetResult(
        run=EVIL,
        state="done",
        name=EVIL,
        output=EVIL,
        models=(model,),
        warnings=(EVIL,),
        versions={EVIL: EVIL},
    )
    told = layers(2)
    told["layers"][0] |= {"name": EVIL, "kind": EVIL, "skipped": EVIL}
    told["warnings"] = [EVIL]
    event = (
        b'{"at_seconds": 1, "kind": "retry", "model": "m", "task": "m/\\"><b>", "text": "</title><script>"}'
    )
    made = Material(layers={EVIL: told}, events=[event], spec_text=EVIL)
    path = tmp_path / "hostile.html"
    path.write_text(render_html(hostile, made), encoding="utf-8")
    page = browser.open(path)
    page.click("table.fleet tbody th button")
    assert page.run(NAMES) == [EVIL]
    assert page.run("document.querySelector('.layers code').textContent") == EVIL
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("window.pwned") is None
    assert page.complaints() == []
    assert page.requests() == [path.as_uri()]


def test_the_page_of_many_runs(browser: Browser, tmp_path: Path) -> None:
    lines = [
        RunLine(
            run=f"202603{day:02}T020000000Z-aabbcc",
            name="nightly",
            state="done",
            seconds=60.0 + day,
            models={"published": day, "unchanged": 40, "rejected": day % 3},
            bytes_before=1e9 + 1e7 * day,
            bytes_after=1e8,
        )
        for day in range(1, 29)
    ]
    path = tmp_path / "runs.html"
    path.write_text(render_runs(str(tmp_path / "output"), lines, page=str(path)), encoding="utf-8")
    page = browser.open(path)
    assert page.run("document.querySelectorAll('table.runs tbody tr').length") == 28
    href = page.run("document.querySelector('table.runs a').getAttribute('href')")
    assert href == "output/runs/20260328T020000000Z-aabbcc/report.html"
    assert page.run("document.querySelectorAll('.s-saved').length") == 28
    assert page.complaints() == []
    assert page.requests() == [path.as_uri()]
