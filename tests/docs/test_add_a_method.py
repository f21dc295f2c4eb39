"""docs/add-a-method.md is followed in a copy of this repository."""

import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PARTS = (
    "compression",
    "storage",
    "jobs",
    "pyproject.toml",
    "README.md",
    "benchmarks/fork_server.py",
    "tests/conftest.py",
    "tests/readme_tables.py",
    "tests/jobs/test_methods.py",
    "tests/compression/pruning/test_every_method.py",
)


def test_add_a_method(reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    (tmp_path / ".path").mkdir()
    (tmp_path / ".path/fleetpress").symlink_to(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / ".path"))  # as `pip install -e .` in the copy would do
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    someone = reader()
    someone.in_process = False
    someone.follow("add-a-method.md")
    assert "| pruning | `largest_weight` |" in (tmp_path / "README.md").read_text()
    assert "largest_weight" not in (ROOT / "README.md").read_text()
