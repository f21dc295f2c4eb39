"""What docs/ says in numbers is what the scripts print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("part", "script"),
    [("arithmetic", "checkpoints/arithmetic.py"), ("fleet", "fleet/arithmetic.py")],
    ids=["a large checkpoint", "a large fleet"],
)
def test_the_arithmetic_is_the_script_s(part: str, script: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ),
    )
    assert result.returncode == 0, result.stderr
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    told = text.partition(f"<!-- {part} -->\n")[2].partition(f"<!-- /{part} -->")[0]
    assert result.stdout.strip() == told.strip()
