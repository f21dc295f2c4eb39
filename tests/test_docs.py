"""docs/: numbers are those that the scripts print, the index names every page, links lead somewhere.

tests/docs follows the pages themselves.
"""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


SCRIPTS = {"arithmetic": "checkpoints/arithmetic.py", "fleet": "fleet/arithmetic.py"}  # by part of the page


@pytest.mark.parametrize("part", SCRIPTS, ids=["a large checkpoint", "a large fleet"])
def test_the_arithmetic_is_the_script_s(
    part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / "benchmarks" / SCRIPTS[part]
    monkeypatch.syspath_prepend(str(script.parent))  # as Python itself does for a script
    runpy.run_path(str(script), run_name="__main__")  # here, where torch is loaded
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    told = text.partition(f"<!-- {part} -->\n")[2].partition(f"<!-- /{part} -->")[0]
    assert capsys.readouterr().out.strip() == told.strip()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = set(_LINK.findall(index))
    assert {path.name for path in PAGES[1:]} - {"README.md"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in _anchors(path), f"{link}: no such heading in {path.name}"


def _anchors(page: Path) -> set[str]:
    """Of every heading, as GitHub makes them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
