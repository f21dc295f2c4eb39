"""The metric before and after on held-out data, as `metrics.json` tells it, and whether too much was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleetpress.compression.confidence import Difference


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The metric on held-out data, how sure the drop is, and why the model is rejected, if it is.

    `stage` says which model `before` is, where it may be another one than the source.
    """

    metric: str
    before: float
    after: float
    drop: Mapping[str, float | None]
    verdict: str | None
    stage: str | None = None

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `before` and `after` of the metrics say of it."""
        stage = {} if self.stage is None else {"stage": self.stage}
        return (
            {"metric": self.metric, "value": _finite(self.before), **stage},
            {"metric": self.metric, "value": _finite(self.after), "drop": dict(self.drop)},
        )


def drop_facts(found: Difference) -> dict[str, float | None]:
    """The drop, its standard error and the bounds of its 95 % interval."""
    return {key: _finite(getattr(found, key)) for key in ("drop", "standard_error", "low", "high")}


def refusal(metric: str, found: Difference, limit: str | float, remedy: str) -> str | None:
    """Why a model is rejected that may lose `limit` of the metric, if it is; the `remedy` says what to do about it."""
    from fleetpress.compression.metrics import within

    if within(metric, found.before, found.after, limit):
        return None
    return f"{metric} went from {found.before:.4f} to {found.after:.4f}, more than max_drop {limit} allows; {remedy}"


def _finite(value: float) -> float | None:
    """JSON has no infinity, such as the psnr of outputs that are the targets, and no NaN."""
    return value if math.isfinite(value) else None
