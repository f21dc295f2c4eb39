"""What goes to stdout, whatever libraries print there."""

import json
import subprocess
import sys

_CHATTY = """
import os, sys
from fleetpress.jobs import cli
answer = cli._answer
cli._answer = lambda arguments: answer(arguments) if os.write(1, b"the solver talks\\n") else 1
sys.exit(cli.main(["methods", "gptq", "--json"]))
"""


def _answered(redirection: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, _CHATTY]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_a_native_library_prints_does_not_spoil_data() -> None:
    done = _answered("")
    assert done.returncode == 0
    assert json.loads(done.stdout)
    assert done.stderr == "the solver talks\n"


def test_without_stderr_there_is_data_still() -> None:
    done = _answered("2>&-")
    assert done.returncode == 0
    assert '"gptq"' in done.stdout
