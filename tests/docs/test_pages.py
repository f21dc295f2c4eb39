"""Every page of docs/ is followed to the letter: with a real model, a real store, and stand-ins for rented machines."""

import re
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.spec.fleet_spec import parse_spec

DOCS = Path(__file__).parents[2] / "docs"
TASKS = [
    path.name for path in sorted(DOCS.glob("*.md")) if "**What you get:**" in path.read_text(encoding="utf-8")
]


def test_first_model(reader: Any) -> None:
    someone = reader()
    someone.follow("first-model.md")
    assert (someone.place / "report.html").stat().st_size > 1000
    assert "1 unchanged" in someone.told


def test_my_data(reader: Any) -> None:
    someone = reader()
    someone.follow("my-data.md")
    published = {path.parent.name for path in someone.place.glob("compressed*/models/*/latest.json")}
    assert published == {"sign", "plain"}


def test_a_fleet_on_s3(reader: Any, s3_uri: str, moto_server: str) -> None:
    someone = reader(**{"http://127.0.0.1:9000": moto_server, "s3://my-bucket": s3_uri})
    someone.follow("s3-fleet.md")
    assert someone.records("aws") == [["s3", "cp", "fleet", f"{s3_uri}/fleet", "--recursive"]]


def test_serving(reader: Any) -> None:
    someone = reader()
    someone.follow("serving.md")
    assert (someone.place / "plain/digits/model.pt2").exists()


def test_let_it_choose(page_blocks: Any) -> None:
    """The spec is one; what the table tells to write are recipes."""
    (block,) = page_blocks("auto.md")
    assert parse_spec(block.text, "auto.md").recipes["smallest"].auto is not None
    written = re.findall(r"`(auto: {.*?})`", (DOCS / "auto.md").read_text(encoding="utf-8"))
    assert len(written) == 5
    for recipe in written:
        text = re.sub(r"smallest: {.*}\n", lambda _, own=recipe: f"smallest: {{{own}}}\n", block.text)
        assert parse_spec(text, "auto.md").recipes["smallest"].auto is not None


def test_calibrate_a_checkpoint(page_blocks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are data, its spec is one; such runs are in tests/end_to_end/test_calibrated_checkpoints.py."""
    _, program, spec = page_blocks("checkpoints.md")
    monkeypatch.chdir(tmp_path)
    exec(compile(program.text, "checkpoints.md", "exec"), {})
    assert {path.name for path in tmp_path.glob("tokens-*.npz")} == {"tokens-0.npz", "tokens-1.npz"}
    recipe = parse_spec(spec.text, "checkpoints.md").recipes["four_bits"]
    assert recipe.quantize is not None
    assert recipe.quantize.method == "gptq"


@pytest.mark.parametrize("page", TASKS)
def test_a_page_takes_five_minutes_at_most(page: str, page_blocks: Any) -> None:
    """At 200 words a minute; programs are looked at rather than read, and count by the line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = page_blocks(page)
    lines = sum(block.text.count("\n") for block in blocks)
    for block in blocks:
        text = text.replace(block.text, "")
    words = len(text.split())
    assert words + 2 * lines <= 1000, f"{page}: {words} words and {lines} lines of programs"


@pytest.mark.parametrize("page", TASKS)
def test_a_page_says_first_what_you_get_and_last_what_to_do_when_it_fails(page: str) -> None:
    title, first, *_ = (DOCS / page).read_text(encoding="utf-8").split("\n\n")
    assert title.startswith("# ")
    assert first.startswith("**What you get:**")
    assert "\n## When it does not work\n" in (DOCS / page).read_text(encoding="utf-8")
