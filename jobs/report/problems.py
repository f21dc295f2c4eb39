"""Failures first: which models did not make it, why, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..runs.results import FleetResult, ModelResult
from .comparison import BAD, Change, Comparison

_RANKS: Mapping[Change | None, int] = {"regressed": 0, "new": 1, None: 1, "still failing": 2}
_REMEDIES = {
    "rejected": "prune less, use more bits, train longer, or accept more with validate: {max_drop: ...}",
    "failed": "mend the cause and run the spec again: only what is missing is done",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model that was rejected or failed: why, what helps, and what it was in the run before."""

    name: str
    state: str
    reason: str
    remedy: str
    change: Change | None
    published_before: bool


def problems(result: FleetResult, comparison: Comparison) -> list[Problem]:
    """Regressions on top, then what failed for the first time, then what failed before; each in the fleet's order."""
    found = [_problem(model, comparison) for model in result.models if model.reason or model.state in BAD]
    return sorted(found, key=lambda problem: _RANKS.get(problem.change, 1))


def _problem(model: ModelResult, comparison: Comparison) -> Problem:
    reason, remedy = split_reason(model.reason or "no reason was given", model.state)
    change = comparison.changes.get(model.name)
    return Problem(
        name=model.name,
        state=model.state,
        reason=reason,
        remedy=remedy,
        change=change,
        published_before=change == "regressed",
    )


def split_reason(reason: str, state: str) -> tuple[str, str]:
    """What happened, and what to do: a reason of ours tells both, the remedy behind its last semicolon."""
    what, semicolon, remedy = reason.rpartition("; ")
    if semicolon and what.strip() and remedy.strip():
        tries = remedy.rfind(" (tried ")  # `(tried 3 times)` belongs to what happened
        if tries > 0 and remedy.endswith("times)"):
            what, remedy = what + remedy[tries:], remedy[:tries]
        return what, remedy
    return reason, _REMEDIES.get(state, "")
