"""Inputs made up from a program's own shapes: does it run at all, how fast, with which batch sizes."""

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.program import inputs


def smoke_inputs(program: ExportedProgram, batch: int = 2) -> dict[str, Tensor]:
    """Inputs made up from the graph's shapes, to see whether the program runs at all.

    Floating-point inputs are seeded standard normal, whole-number ones zero, bool ones true. Sizes that may change are
    `batch` in the first dimension and 8, or the nearest allowed size, elsewhere.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for node in _input_nodes(program):
        value = node.meta["val"]
        shape = _sizes(program, value.shape, batch)
        if value.dtype is torch.bool:
            made[node.name] = torch.ones(shape, dtype=torch.bool)
        elif value.dtype.is_floating_point or value.dtype.is_complex:
            made[node.name] = torch.randn(shape, generator=generator).to(value.dtype)
        else:
            made[node.name] = torch.zeros(shape, dtype=value.dtype)
    return made


def _input_nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    names = {item.name for item in inputs(program)}
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _sizes(program: ExportedProgram, shape: torch.Size, batch: int) -> list[int]:
    first = {
        symbol
        for node in _input_nodes(program)
        if node.meta["val"].dim() and isinstance(node.meta["val"].shape[0], torch.SymInt)
        for symbol in node.meta["val"].shape[0].node.expr.free_symbols
    }
    sizes = []
    for size in shape:
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            values = {}
            for symbol in expression.free_symbols:
                allowed = program.range_constraints.get(symbol)
                wanted = batch if symbol in first else 8
                values[symbol] = (
                    wanted if allowed is None else max(int(allowed.lower), min(wanted, allowed.upper))
                )
            sizes.append(int(expression.subs(values)))
        else:
            sizes.append(size)
    return sizes
