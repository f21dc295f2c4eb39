"""docs/troubleshooting.md quotes only what the code says."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import troubleshooting_tables

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
_STAND_FOR_NAMES = re.compile(r"\b(?:ADDRESS|BUCKET|OUTPUT|URI|TASK|SPEC)\b")
QUOTES = [
    quote
    for entry in re.findall(r"^- (`.*?`): ", TEXT, re.MULTILINE | re.DOTALL)
    for quote in re.findall(r"`([^`]+)`", entry)
]


@cache
def said() -> str:
    """Every text in the sources, one a line; what is put in at run time is a NUL."""
    texts = []
    for package in ("compression", "storage", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in texts)


def is_said(quote: str) -> bool:
    """Whether one text of the sources has the quote; a part in capitals stands for anything."""
    return bool(re.search(".*".join(map(re.escape, _STAND_FOR_NAMES.split(quote))), said()))


def test_there_are_messages() -> None:
    assert len(QUOTES) > 40


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_one_of_the_code(quote: str) -> None:
    quote = " ".join(quote.split())
    assert is_said(quote) or all(is_said(part) for part in quote.split("; ")), "nothing in the code says so"


def test_generated_parts_are_what_the_code_says() -> None:
    assert troubleshooting_tables.written(TEXT) == TEXT, "run: python tests/troubleshooting_tables.py"


def test_troubleshooting(reader: Any, good_spec: str) -> None:
    reader().follow("troubleshooting.md")


@pytest.fixture
def good_spec(tmp_path: Path) -> str:
    """A spec whose model is tiny: what the page's reader has already."""
    import torch
    from safetensors.torch import save_file

    save_file({"up.weight": torch.ones(8, 8)}, tmp_path / "net.safetensors")
    text = "version: 1\nname: mine\noutput: out\nmodels: [{source: net.safetensors, recipe: w8}]\n"
    (tmp_path / "fleet.yaml").write_text(text + "recipes: {w8: {quantize: {scheme: W8A16}}}\n")
    return str(tmp_path / "fleet.yaml")
