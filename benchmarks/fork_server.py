"""A process that loads everything once and forks for every order: runs that need no time to start.

A program that serves forks reads a line of JSON from stdin for each order and answers with a line; `ForkServer` is the
side that asks.
"""

import copy
import functools
import gc
import json
import pickle
import select
import subprocess
import sys
import tempfile
import typing
from types import SimpleNamespace
from typing import Any, Self


class ForkServer:
    """The process of `program` that forks, from entering to leaving the context; used by one thread at a time."""

    def __init__(self, program: str, longest_seconds: float, *arguments: str) -> None:
        self._command, self._longest_seconds = [sys.executable, program, *arguments], longest_seconds

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="fleetpress-forks-")
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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


def quicken_archives() -> None:
    """Programs are read and written in four fifths of the time, with the same bytes; once a process.

    For every node of a program torch asks anew which types the fields of its schema have, and it copies the whole of
    what it writes in Python, to see whether a check of the copy fails.
    """
    from torch._export.serde import serialize

    @functools.cache
    def types_of(cls: type) -> dict[str, Any]:
        return typing.get_type_hints(cls, globalns=vars(serialize.schema))

    asked = {"get_type_hints": lambda cls, globalns: types_of(cls)}
    copied = {"deepcopy": lambda value: pickle.loads(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))}
    serialize.typing = SimpleNamespace(**vars(typing) | asked)  # type: ignore[attr-defined]
    serialize.copy = SimpleNamespace(**vars(copy) | copied)  # type: ignore[attr-defined]


def load_everything() -> None:
    """What a run loads, and what the first one costs beyond the others, paid once by the process that forks.

    On one thread: others do not survive a fork. No child looks for cycles among what it was born with.
    """
    import torch

    import fleetpress.compression.training
    import fleetpress.jobs.checkpoint.steps
    import fleetpress.jobs.cli
    import fleetpress.jobs.driver.run
    import fleetpress.jobs.executors.inline
    import fleetpress.jobs.programs.modules
    import fleetpress.jobs.programs.steps
    import fleetpress.jobs.runs.live
    import fleetpress.jobs.tables
    import fleetpress.storage.local
    import fleetpress.storage.s3  # noqa: F401 - for all children
    from fleetpress.jobs.report import template
    from fleetpress.storage.programs import load_program, module_to_program, save_program
    from fleetpress.storage.s3_client import new_client

    quicken_archives()
    template._environment().get_template("page.html")
    torch.set_num_threads(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    program = load_program(save_program(module_to_program(net, [torch.zeros(2, 4)]), compress=False))
    program.module()(torch.zeros(3, 4))
    new_client(
        endpoint="http://127.0.0.1:9", access_key="none", secret_key="none"
    )  # nobody is asked anything
    gc.collect()
    gc.freeze()


def load_transformers() -> None:
    """What a run loads beside that if it runs checkpoints."""
    from transformers import LlamaForCausalLM  # noqa: F401 - for all children

    import fleetpress.jobs.checkpoint.advancing
    import fleetpress.jobs.checkpoint.calibrating
    import fleetpress.jobs.checkpoint.scoring
    import fleetpress.jobs.checkpoint.solving  # noqa: F401 - for all children
