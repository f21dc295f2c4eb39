"""Coverage next to torch-pruning, on the same nets.

On convolutional nets both reach the same layers. Where a LayerNorm follows, torch-pruning goes on and the net computes
something else (its statistics change); such streams are left alone here, as deleting them is not silencing them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch_pruning
from torch import nn
from torch.export import ExportedProgram

from fleetpress.compression.pruning import find_units

Exported = Callable[[str, bool], tuple[nn.Module, ExportedProgram]]
NETS = ["article_cnn", "mlp", "vgg", "resnet", "resnet_bottleneck", "resnext", "mobilenet", "densenet"]
INEXACT_THERE = {"convnext": {"0", "1.depthwise", "1.down", "2", "3.depthwise", "3.down"}}


def widths(model: nn.Module) -> dict[str, int]:
    """Output units of every layer."""
    return {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


@pytest.mark.parametrize("name", [*NETS, *INEXACT_THERE])
def test_reaches_what_torch_pruning_reaches(
    name: str, architectures: dict[str, Any], exported: Exported
) -> None:
    units = find_units(exported(name, True)[1])
    ours = {layer for group in units.groups for layer in group.layers}

    model = architectures[name].build().eval()
    sample = architectures[name].inputs(1).float()
    before = widths(model)
    torch_pruning.pruner.MagnitudePruner(
        model,
        sample,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(list(before)[-1])],
    ).step()
    theirs = {layer for layer, width in widths(model).items() if width < before[layer]}
    assert theirs - ours == INEXACT_THERE.get(name, set())
    assert theirs
    for layer in theirs - ours:
        assert "layer_norm" in units.skipped[layer]
