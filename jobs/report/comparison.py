"""What has changed since the run before: pure rules over two summaries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..runs.results import (
    GOOD,
    FleetResult,
    ModelResult,
)

Change = Literal["regressed", "still failing", "recovered", "new", "changed", "unchanged", "unfinished"]
BAD = ("rejected", "failed")
# In the order of a reader's interest; what they mean is said on the page.
MEANINGS: Mapping[Change, str] = {
    "regressed": "published in the run before, rejected or failed now",
    "still failing": "rejected or failed in both runs",
    "recovered": "rejected or failed in the run before, published now",
    "new": "not in the run before",
    "changed": "published in both, as another artifact",
    "unchanged": "published in both, the same artifact",
    "unfinished": "not ended in this run",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every model's change by name, how each stood before, and the models that are in the fleet no more."""

    before: FleetResult | None
    changes: Mapping[str, Change] = field(default_factory=dict)
    earlier: Mapping[str, ModelResult] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def names(self, change: Change) -> list[str]:
        """Models that changed in this way, in the order of the fleet."""
        return [name for name, its in self.changes.items() if its == change]


def compare(now: FleetResult, before: FleetResult | None) -> Comparison:
    """`before` is the latest run of the same spec that was not interrupted; without it nothing is said to be new."""
    if before is None:
        return Comparison(before=None)
    earlier = {model.name: model for model in before.models}
    changes = {model.name: _change(model, earlier.get(model.name)) for model in now.models}
    # A run that has not looked for its models yet knows nothing of removed ones.
    removed = tuple(name for name in earlier if name not in changes) if now.models else ()
    return Comparison(before=before, changes=changes, earlier=earlier, removed=removed)


def _change(now: ModelResult, before: ModelResult | None) -> Change:
    if now.state not in GOOD and now.state not in BAD:
        return "unfinished"
    if before is None:
        return "new"
    if now.state in BAD:
        return "regressed" if before.state in GOOD else "still failing"
    if before.state not in GOOD:
        return "recovered"
    return "unchanged" if now.digest == before.digest else "changed"
