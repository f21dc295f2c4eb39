"""What docs/ says in numbers is what the scripts print."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_arithmetic_of_a_large_checkpoint_is_the_script_s() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "checkpoints" / "arithmetic.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ),
    )
    assert result.returncode == 0, result.stderr
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    told = text.partition("<!-- arithmetic -->\n")[2].partition("<!-- /arithmetic -->")[0]
    assert result.stdout.strip() == told.strip()
