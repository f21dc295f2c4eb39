"""What goes to stdout, whatever libraries print there."""

import json
import subprocess
import sys

_PLAIN = """
import sys
from fleetpress.jobs import cli
sys.exit(cli.main(["methods", "gptq", *sys.argv[1:]]))
"""
_CHATTY = f"""
import os
from fleetpress.jobs import cli
answer = cli._answer
cli._answer = lambda arguments: answer(arguments) if os.write(1, b"the solver talks\\n") else 1
{_PLAIN}
"""


def _answered(code: str, *arguments: str, redirection: str = "") -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_a_native_library_prints_does_not_spoil_data() -> None:
    done = _answered(_CHATTY, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)
    assert done.stderr == "the solver talks\n"


def test_without_stderr_there_is_data_still() -> None:
    done = _answered(_CHATTY, "--json", redirection="2>&-")
    assert done.returncode == 0
    assert '"gptq"' in done.stdout


def test_a_closed_stdout_is_no_internal_error() -> None:
    done = _answered(_PLAIN, redirection=">&-")
    assert (done.returncode, done.stderr) == (0, "")
