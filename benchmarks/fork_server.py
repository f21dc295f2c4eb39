"""A process that loads everything once and forks for every order: runs that need no time to start.

A program that serves forks reads a line of JSON from stdin for each order and answers with a line; `ForkServer` is the
side that asks.
"""

import json
import select
import subprocess
import sys
import tempfile
from typing import Any, Self


class ForkServer:
    """The process of `program` that forks, from entering to leaving the context; used by one thread at a time."""

    def __init__(self, program: str, longest_seconds: float) -> None:
        self._program, self._longest_seconds = program, longest_seconds

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="fleetpress-forks-")
        self._process = subprocess.Popen(
            [sys.executable, self._program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr] # it ends with its input
        self._process.wait()
        self._folder.cleanup()

    def ask(self, order: object, what: str) -> Any:
        """The answer to an order, which `what` names. Raises TimeoutError if there is none in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], self._longest_seconds)[0]:
            raise TimeoutError(f"no end of {what}")
        return json.loads(stdout.readline())
