"""Costs agree with torch's own counter, and with sums done by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fleetpress.compression import cost

Exported = Callable[[str, bool], tuple[nn.Module, ExportedProgram]]


def test_macs_are_half_the_flops_that_torch_counts(
    architecture: str, architectures: dict[str, Any], exported: Exported
) -> None:
    _, program = exported(architecture, True)
    # The counter does not see into fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        program.module()(architectures[architecture].inputs(4))
    assert cost.macs(program, batch=4) * 2 == counter.get_total_flops()


def test_parameters_count_tied_ones_once(architecture: str, exported: Exported) -> None:
    model, program = exported(architecture, False)
    assert cost.parameters(program) == sum(value.numel() for value in model.parameters())


def test_recurrent_layers_multiply_every_step() -> None:
    model = nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    program = torch.export.export(model, (torch.randn(3, 4, 5),))
    step = 2 * 4 * 7 * (5 + 7) + 2 * 4 * 7 * (14 + 7)
    assert cost.macs(program) == 3 * 4 * step


def test_einsum_and_products() -> None:
    class Products(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bij,bjk->bik", x, y) + x @ y

    program = torch.export.export(Products(), (torch.randn(2, 3, 4), torch.randn(2, 4, 5)))
    assert cost.macs(program) == 2 * (2 * 3 * 4 * 5)
    assert cost.stored_bytes(program) == 0
