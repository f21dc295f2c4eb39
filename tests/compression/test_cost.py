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


def test_tokens_of_a_sample_are_counted_where_their_number_is_free() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 8)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.one(inputs).mean(1)  # type: ignore[no-any-return]

    example = torch.zeros(2, 3, 4)
    batch, tokens = torch.export.Dim("batch", max=64), torch.export.Dim("tokens", max=64)
    for free, expected in (({0: batch, 1: tokens}, 10 * 32), ({0: batch}, 3 * 32), (None, 2 * 3 * 32)):
        program = torch.export.export(Encoder(), (example,), dynamic_shapes=(free,) if free else None)
        assert (
            cost.sample_macs(program, {"inputs": torch.zeros(5, 10, 4), "targets": torch.zeros(5, 99)})
            == expected
        )
