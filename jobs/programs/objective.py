"""What a model is trained for and measured by, where the spec leaves it open."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import TARGETS
from fleetpress.compression.metrics import METRICS, default_metric
from fleetpress.compression.outputs import meaning


def loss_name(data: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> str:
    """The spec's loss; else by the targets: class numbers, other numbers, or none (distillation)."""
    if data["loss"]:
        return str(data["loss"])
    if TARGETS not in arrays:
        return "distillation"
    return "mse" if arrays[TARGETS].is_floating_point() else "cross_entropy"


def metric_name(data: Mapping[str, Any], arrays: Mapping[str, Tensor], program: ExportedProgram) -> str:
    """The spec's metric; else that of the loss, or fidelity to the original where there are no targets."""
    if data["metric"]:
        return str(data["metric"])
    return default_metric(loss_name(data, arrays), meaning(program))


def measured(data: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The arrays as metrics are to read them: yes or no per output are whole numbers, not shares of one class each."""
    if data["loss"] != "bce_with_logits" or TARGETS not in arrays:
        return arrays
    return {**arrays, TARGETS: (arrays[TARGETS] > 0.5).long()}


def is_fidelity(metric: str) -> bool:
    """Whether the metric compares with the original model's outputs rather than with targets."""
    return METRICS[metric].needs == "reference"
