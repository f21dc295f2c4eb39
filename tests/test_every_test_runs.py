"""The plugin of CI: a run in which a test was left out fails, in one process and over workers alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1] / ".ci"
RUNS = "def test_it(): pass\n"
LEFT_OUT = {
    "test_marked.py": "import pytest\n@pytest.mark.skip\ndef test_it(): pass\n",
    "test_whole.py": "import pytest\npytest.skip(allow_module_level=True)\n",
    "test_failing.py": "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False\n",
    "test_named.py": "def test_other(): pass\n",
}


def run(folder: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "nothing_skipped", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PLUGIN), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "2")], ids=["alone", "workers"])
def test_a_test_that_was_left_out_fails_the_run(workers: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text(RUNS)
    code, told = run(tmp_path, *workers)
    assert code == 0, told
    for name, text in LEFT_OUT.items():
        (tmp_path / name).write_text(text)
    code, told = run(tmp_path, *workers, "-k", "test_it")
    assert code == 1, told
    for reason in (
        "test_marked.py::test_it: skipped",
        "test_whole.py: skipped while collecting",
        "test_failing.py::test_it: skipped or expected to fail",
        "test_named.py::test_other: deselected",
    ):
        assert reason in told
    assert told.count("deselected\n") == 1  # and not once a worker
