"""Runs of the command line as processes of their own that need no time to start: forks of one that has loaded all.

    with Runner() as runner:
        outcome = runner.run(["run", "spec.yaml", "--executor", "inline", "--json"], environment)

The child's store client gives up a read after READ_SECONDS, and shards are cut into tasks of TASK_BYTES, so that a
stalled body and a shard of several uploads fit into a short test; nothing else differs from `fleetpress` itself.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1]))

from fork_server import ForkServer, load_everything

READ_SECONDS = 3  # a busy machine may take one to answer
TASK_BYTES = 7 << 20
PART_BYTES = 5 << 20  # what S3 takes at least
_LONGEST_RUN_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left behind; a process that a signal ended has a negative code."""

    code: int
    out: str
    err: str

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The models of a run that came to its end, by name."""
        try:
            return {model["name"]: model for model in json.loads(self.out)["models"]}
        except ValueError:
            return {}

    @property
    def reason(self) -> str:
        """Why it did not end well, in the words of the run; empty if it did."""
        if not self.code:
            return ""
        reasons = [f"{name}: {model['reason']}" for name, model in self.models.items() if model["reason"]]
        said = [line for line in self.err.splitlines() if line.startswith("fleetpress: ")]
        return "; ".join((*reasons, *said)) or (self.err.strip().splitlines() or [""])[-1]


class Runner(ForkServer):
    """The process that forks, from entering to leaving the context."""

    def __init__(self) -> None:
        super().__init__(__file__, 2 * _LONGEST_RUN_SECONDS)

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], *, before: str = "") -> Outcome:
        """One command line to its end; `before` is Python that its process runs first. Raises TimeoutError."""
        out, err = (Path(self._folder.name, name) for name in ("out", "err"))
        order = {
            "arguments": arguments,
            "environment": dict(environment),
            "before": before,
            "out": str(out),
            "err": str(err),
        }
        command = f"fleetpress {' '.join(arguments)}"
        code = self.ask(order, command)
        if code == -signal.SIGALRM:
            raise TimeoutError(f"{command} took longer than {_LONGEST_RUN_SECONDS} s")
        return Outcome(code=code, out=out.read_text(), err=err.read_text())


@functools.cache
def shared_runner() -> Runner:
    """One for all tests of this process; it ends with it."""
    runner = Runner().__enter__()
    atexit.register(runner.__exit__)
    return runner


def _serve() -> None:
    """Fork for every line of JSON on stdin; say the exit code of each."""
    load_everything()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_obey(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _obey(order: Mapping[str, Any]) -> int:
    """The child: the command line in its environment, what it says in files."""
    from botocore.config import Config

    from fleetpress.jobs.checkpoint import layout
    from fleetpress.jobs.cli import main
    from fleetpress.storage import s3_client

    signal.alarm(_LONGEST_RUN_SECONDS)
    os.environ.update(order["environment"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    exec(order["before"], {})
    config = s3_client._config
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.multiple(layout, TASK_BYTES=TASK_BYTES, PART_BYTES=PART_BYTES))
        patches.enter_context(
            patch.object(s3_client, "_config", lambda: config().merge(Config(read_timeout=READ_SECONDS)))
        )
        try:
            return main(order["arguments"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


if __name__ == "__main__":
    _serve()
