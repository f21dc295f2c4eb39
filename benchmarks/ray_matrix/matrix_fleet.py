"""The fleet of the Ray matrix: small nets that are trained for a second or two each, and how a run of it is watched."""

import io
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

SPEC = """\
version: 1
name: matrix
output: {output}
models:
  - {{source: "{source}/net-*.pt2", data: points, recipe: small}}{more}
data:
  points: {{train: "{source}/train.npz", eval: "{source}/eval.npz", loss: cross_entropy}}
  heavy: {{train: "{source}/heavy.npz", eval: "{source}/eval.npz", loss: cross_entropy}}
recipes:
  small:
    train: {{epochs: {epochs}, batch_size: 32}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    quantize: {{scheme: W8A16}}
    validate: {{max_drop: 1.0}}
resources: {{memory_per_task: {memory}}}
"""
HUNGRY = '\n  - {{source: "{source}/hungry/model.pt2", data: heavy, recipe: small}}'
_FLEETPRESS = "import sys; from fleetpress.jobs.cli import main; sys.exit(main())"
_LONGEST_RUN_SECONDS = 240
_STARTED = re.compile(r"^[\d.]+s (\S+) (\S+) started$", re.MULTILINE)
_FINISHED = re.compile(r"^[\d.]+s (\S+) (\S+) finished ", re.MULTILINE)


def write_fleet(place: str, models: int) -> None:
    """The sources of `models` nets and their data at `place`."""
    store = open_store(place)
    for number in range(models):
        torch.manual_seed(number)
        net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
        data = save_program(module_to_program(net, [torch.zeros(2, 6)]), compress=False)
        store.put(f"net-{number:03}.pt2", data)
        if number == 0:
            store.put("hungry/model.pt2", data)
    store.put("train.npz", _points(256, 1))
    store.put("eval.npz", _points(64, 2))
    store.put("heavy.npz", _heavy(12 << 20))


def _heavy(rows: int) -> bytes:
    """Some megabytes that unpack to four hundred."""
    bits = np.random.default_rng(0).integers(0, 2, (rows, 6), dtype=np.int8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, inputs=bits.astype(np.float32), targets=np.zeros(rows, np.int64))
    return buffer.getvalue()


def _points(rows: int, seed: int) -> bytes:
    inputs = np.random.default_rng(seed).standard_normal((rows, 6), dtype=np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, inputs=inputs, targets=inputs[:, :3].argmax(1))
    return buffer.getvalue()


def write_spec(
    path: Path, source: str, output: str, *, epochs: int, memory: str = "2GiB", more: str = ""
) -> Path:
    """A spec for the fleet at `source`; gives its path."""
    more = more.format(source=source)
    path.write_text(SPEC.format(source=source, output=output, epochs=epochs, memory=memory, more=more))
    return path


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that is over: exit code, what it said, and how often each task was started and finished."""

    code: int
    said: str
    started: Counter[str]
    finished: Counter[str]

    def lines(self, *words: str) -> list[str]:
        """Lines of its messages with one of these words."""
        return [line for line in self.said.splitlines() if any(word in line for word in words)]


class Driver:
    """`fleetpress run` as a process of its own."""

    def __init__(
        self,
        spec: Path,
        arguments: list[str],
        environment: Mapping[str, str],
        *,
        prefix: Sequence[str] = (),
    ) -> None:
        self._said: list[str] = []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", _FLEETPRESS, "run", str(spec), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._said.extend(self.process.stderr)

    def ended(self) -> Ended:
        """Wait for its end. Raises subprocess.TimeoutExpired for one that hangs, after it was killed."""
        try:
            code = self.process.wait(_LONGEST_RUN_SECONDS)
        finally:
            self.process.kill()
        self._reader.join(10)
        said = "".join(self._said)
        started, finished = (Counter(map("/".join, found.findall(said))) for found in (_STARTED, _FINISHED))
        return Ended(code=code, said=said, started=started, finished=finished)
