"""Gradient statistics that a step of pruning looks at: merged from collect tasks, or those of the training."""

from functools import reduce

from fleetpress.compression.statistics import GradientStatistics

from ..handover import Payload
from .materials import STATISTICS, statistics_parts, stored_tensors


def gradient_statistics(payload: Payload) -> GradientStatistics | None:
    """Merged from the collect tasks in their order, or those of the training; None without either."""
    stages = payload["stages"]
    if "collect" in stages:
        parts = statistics_parts(payload, stages["collect"])
        return reduce(GradientStatistics.merge, map(GradientStatistics.from_tensors, parts))
    if "train" not in stages or stages.get("rounds"):
        return None
    values = stored_tensors(payload, stages["train"])
    found = {
        name.removeprefix(STATISTICS): value for name, value in values.items() if name.startswith(STATISTICS)
    }
    return GradientStatistics.from_tensors(found) if found else None
