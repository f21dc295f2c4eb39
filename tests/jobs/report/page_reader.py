"""A page as a test reads it: its text, its table, its data, and whether its tags are closed in order."""

import json
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "link", "img", "hr", "input"}
OPTIONAL = {"td", "th", "tr"}  # HTML lets their end tags be left out


class Page(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes, text by table row, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.extend(attrs)
        if tag in OPTIONAL:
            self._leave("td", "th", *(["tr"] if tag == "tr" else []))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def _leave(self, *tags: str) -> None:
        while self.open and self.open[-1] in tags:
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPTIONAL:
            self._leave("td", "th", "tr")
        elif tag == "tr":
            self._leave("td", "th")
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells behind a model's name in the table of the fleet."""
        return next(
            [cell.strip() for cell in row[1:]]
            for row in reversed(self.rows)
            if row and row[0].strip() == name and len(row) >= 11
        )

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        found: dict[str, Any] = json.loads(self.raw["script"][0])
        return found
