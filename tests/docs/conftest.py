"""Reads pages of docs/ as a reader would: types their commands, saves their files, runs their programs, in order."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fleetpress.jobs.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STAND_INS = Path(__file__).parent / "stand_ins"
_BLOCK = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"\s+# .*")
_EXIT_CODE = re.compile(r"# exit code (\d+)")
_SHELL = re.compile(r"[|&;<>$*`]")
_VARYING = re.compile(r"\d{8}T\d+Z-[0-9a-f]{6}|\d+(?:[.,]\d+)*|\s+")
_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, the file it is to be saved as (or none), its text, and the words before it."""

    language: str
    file: str | None
    text: str
    before: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in _BLOCK.finditer(text):
        before = text[end : match.start()].strip().rpartition("\n\n")[2]
        found.append(Block(language=match[1], file=match[2], text=match[3], before=before))
        end = match.end()
    return found


@dataclass(kw_only=True)
class Reader:
    """Someone who follows a page to the letter, in the folder `place`; `instead` are words that they replace."""

    place: Path
    patch: pytest.MonkeyPatch
    instead: Mapping[str, str] = field(default_factory=dict)
    in_process: bool = True  # faster; else every command is a process of its own
    told: str = ""  # by the last block of commands
    typed: list[str] = field(default_factory=list)

    def follow(self, page: str) -> None:
        """Every block of docs/`page`. Fails at the first that does not do what the page says."""
        for block in blocks_of(DOCS / page):
            text = self._replaced(block.text)
            if block.file:
                assert block.file in block.before, f"{page} does not say where to save {block.file}"
                target = self.place / block.file
                if block.language == "diff":
                    target.write_text(changed(target.read_text(encoding="utf-8"), text), encoding="utf-8")
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
            elif block.language == "sh":
                self.told = "".join(self._type(line) for line in _lines(text))
            elif block.language == "python":
                self.told = self._run_program(text, page)
            elif block.language == "text":
                self._compare(text, page)
            else:
                assert block.language in ("", "yaml"), f"{page}: what is {block.language!r}?"

    def records(self, name: str) -> list[list[str]]:
        """The arguments of all calls of the stand-in `name`, in order."""
        log = self.place / f".{name}.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def _replaced(self, text: str) -> str:
        for word, other in self.instead.items():
            text = text.replace(word, other)
        return text

    def _type(self, line: str) -> str:
        expected = int(found[1]) if (found := _EXIT_CODE.search(line)) else 0
        command = _COMMENT.sub("", line)
        self.typed.append(command)
        words = shlex.split(command)
        if words[0] == "export" and not _SHELL.search(command):
            for word in words[1:]:
                name, _, value = word.partition("=")
                self.patch.setenv(name, value)
                if name == "PYTHONPATH":
                    self.patch.syspath_prepend(str(self.place / value))
            return ""
        if words[0] == "python" and self.in_process:
            return self._run_program((self.place / words[1]).read_text(), words[1])
        if words[0] == "fleetpress" and self.in_process and not _SHELL.search(command):
            code, out = self._fleetpress(words[1:])
        else:
            done = subprocess.run(
                ["/bin/bash", "-c", command],
                cwd=self.place,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            code, out = done.returncode, done.stdout + done.stderr
        assert code == expected, f"{line}\n{out}"
        assert "Traceback" not in out, f"{line}\n{out}"
        return out

    def _fleetpress(self, words: list[str]) -> tuple[int, str]:
        """In this process, which has everything loaded; and without Ray, which gives the same bytes."""
        if words[0] == "run" and "--address" not in words and "--executor" not in words:
            words = [*words, "--executor", "inline"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = main(words)
            except SystemExit as end:
                code = int(end.code or 0)
        return code, out.getvalue()

    def _run_program(self, text: str, name: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(text, name, "exec"), {"__name__": "__main__"})
        return out.getvalue()

    def _compare(self, text: str, page: str) -> None:
        """Every line that the page shows was told; numbers, ids and the width of columns may differ."""
        told = [_VARYING.sub("#", line.strip()) for line in self.told.splitlines()]
        for line in text.splitlines():
            assert _VARYING.sub("#", line.strip()) in told, f"{page} shows\n{line}\nbut it was\n{self.told}"


def changed(text: str, diff: str) -> str:
    """The text after a change: what `-` and ` ` mark is there once, and becomes what `+` and ` ` mark."""
    before = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in " -")
    after = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in " +")
    assert text.count(before) == 1, f"not there just once:\n{before}"
    return text.replace(before, after)


def _lines(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Reader]]:
    """Makes a reader in an empty folder; cluster commands on its PATH are stand-ins that check their arguments."""

    def make(**instead: str) -> Reader:
        programs = tmp_path / ".programs"
        programs.mkdir()
        for script in STAND_INS.glob("*.py"):
            shutil.copy(script, programs / script.stem)
            (programs / script.stem).chmod(0o755)
        (programs / "python3").symlink_to(sys.executable)
        monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        monkeypatch.setenv("STAND_IN_LOGS", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return Reader(place=tmp_path, patch=monkeypatch, instead=instead)

    before = set(sys.modules)
    yield make
    for name in (
        set(sys.modules) - before
    ):  # modules of the page itself: the next page has others of that name
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def page_blocks() -> Callable[[str], list[Block]]:
    """The blocks of a page of docs/."""
    return lambda name: blocks_of(DOCS / name)
