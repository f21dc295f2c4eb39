"""Scales and codebooks that a fine-tuning has trained: to its file, and from there to the step that quantizes."""

from collections.abc import Mapping

from torch import Tensor

from fleetpress.compression.quantization.aware import TrainedScales

from ..handover import Payload
from .materials import (
    ENTRIES,
    SCALES,
    ZERO_POINTS,
    stored_tensors,
)


def scale_tensors(scales: Mapping[str, TrainedScales]) -> dict[str, Tensor]:
    """Trained scales as plain tensors, for the file of the task that trained them."""
    found = {SCALES + name: trained.scale for name, trained in scales.items()}
    zero_points = {name: trained.zero_point for name, trained in scales.items()}
    found |= {ZERO_POINTS + name: value for name, value in zero_points.items() if value is not None}
    entries = {name: trained.entries for name, trained in scales.items()}
    return found | {ENTRIES + name: value for name, value in entries.items() if value is not None}


def trained_scales(payload: Payload) -> dict[str, TrainedScales]:
    """Scales that the fine-tuning of this model has trained, by state name; none without such a fine-tuning."""
    if not payload["recipe"].get("finetune", {}).get("quantization_aware"):
        return {}
    stored = stored_tensors(payload, payload["stages"]["finetune"])
    return {
        name.removeprefix(SCALES): TrainedScales(
            scale=value,
            zero_point=stored.get(ZERO_POINTS + name.removeprefix(SCALES)),
            entries=stored.get(ENTRIES + name.removeprefix(SCALES)),
        )
        for name, value in stored.items()
        if name.startswith(SCALES)
    }
