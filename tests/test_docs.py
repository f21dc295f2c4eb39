"""What docs/ says in numbers is what the scripts print."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


SCRIPTS = {"arithmetic": "checkpoints/arithmetic.py", "fleet": "fleet/arithmetic.py"}  # by part of the page
MARK = "-- next --"
RUN_ALL = f"""
import runpy, sys
for path in sys.argv[1:]:
    sys.path.insert(0, path.rpartition("/")[0])  # as Python itself does for a script
    runpy.run_path(path, run_name="__main__")
    print("{MARK}", flush=True)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each script prints; in one process, which loads torch once."""
    result = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *(str(ROOT / "benchmarks" / script) for script in SCRIPTS.values())],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(SCRIPTS, result.stdout.split(MARK), strict=False))


@pytest.mark.parametrize("part", SCRIPTS, ids=["a large checkpoint", "a large fleet"])
def test_the_arithmetic_is_the_script_s(part: str, printed: dict[str, str]) -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    told = text.partition(f"<!-- {part} -->\n")[2].partition(f"<!-- /{part} -->")[0]
    assert printed[part].strip() == told.strip()
