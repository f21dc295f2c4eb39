"""One candidate: built without a fold of the train data, measured on that fold, fold by fold."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fleetpress.compression.confidence import Difference, difference, without_memory
from fleetpress.compression.cost import macs
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.metrics import Sums, allowed_drop

from ..handover import Payload, record
from ..planning.fleet import Fold
from ..planning.plan import TRIALS_AT_ONCE
from ..programs.assembling import assembled
from ..programs.materials import remembered
from ..programs.publishing import call_ms
from ..tasks import StepResult
from .chain import built
from .joint import expected_of
from .measured import Goal, Measured, measured_in
from .original import Original
from .search import propose
from .sensing import table_of


def trial(payload: Payload) -> StepResult:
    """Measure the `index`-th candidate that the trials of earlier rounds make worth it; nothing if there is none."""
    history, original = trials_of(payload), Original(payload)
    searched = original.searched()
    goal = goal_of(payload, original.value(), macs(original.program))
    table = table_of(payload)
    wanted = remembered(
        f"wanted-{payload['stages']['sense']}-{payload['stages']['trial']}-{goal}-{searched}",
        lambda: propose(history, goal, table, searched, TRIALS_AT_ONCE),
    )
    if len(wanted) <= payload["index"]:
        return StepResult(result={"skipped": "no other candidate is worth a trial"})
    family, x, recipe = wanted[payload["index"]]
    tried: dict[str, Any] = {"family": family, "x": x, "recipe": recipe}
    is_tuned = "finetune" in recipe
    folds = searched.folds if is_tuned else payload["options"]["folds"]
    seen = _on_folds(payload, recipe, original, folds, goal)
    if isinstance(seen, str):
        return StepResult(result={**tried, "refused": seen})
    apart = difference(original.metric, seen.before, seen.after, seed=payload["seed"])
    if not all(map(math.isfinite, vars(apart).values())):
        why = f"{original.metric} went from {apart.before:g} to {apart.after:g}"
        return StepResult(result={**tried, "refused": why})
    if is_tuned and goal.cost == "bytes":
        tried["expected"] = expected_of(recipe, table)
    if (is_tuned or "prune" in recipe) and math.isfinite(seen.divergence):
        tried["divergence"] = seen.divergence
    told = _told(payload, original, seen, apart) if is_tuned else asdict(apart)
    return StepResult(result={**tried, "costs": seen.costs, "metric": original.metric, **told})


@dataclass(kw_only=True)
class _Seen:
    """The metric's sums on the folds `before` and `after`, and those of samples that the candidate was trained on."""

    before: list[Sums] = field(default_factory=list)
    after: list[Sums] = field(default_factory=list)
    trained_before: list[Sums] = field(default_factory=list)
    trained_after: list[Sums] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    divergence: float = 0.0


def _on_folds(
    payload: Payload, recipe: Mapping[str, Any], original: Original, folds: int, goal: Goal
) -> _Seen | str:
    """Build the candidate without each of the first `folds` folds and measure it there; its costs are those of the
    first. Or why it cannot be built.
    """
    seen = _Seen()
    for index in range(folds):
        fold = Fold(index=index, of=payload["options"]["folds"])
        try:
            found = assembled(built(payload, recipe, Fold(index=index, of=fold.of, is_left_out=True)))
        except CompressionError as error:  # a net without units to delete, a training that diverged ...
            return str(error)
        seen.before += original.sums(fold, of=folds)
        seen.after += original.sums_of(found.served, fold, of=folds)
        if "finetune" in recipe:
            other = Fold(index=(index + 1) % fold.of, of=fold.of)
            seen.trained_before += original.sums(other, of=folds)
            seen.trained_after += original.sums_of(found.served, other, of=folds)
        if not seen.costs:
            seen.divergence = original.divergence(found.served, fold)
            seen.costs = {"bytes": len(found.data), "macs": macs(found.plain)}
            if goal.cost == "latency_ms":
                seen.costs["latency_ms"] = call_ms(Runner(found.served))
    return seen


def _told(payload: Payload, original: Original, seen: _Seen, apart: Difference) -> dict[str, Any]:
    """The difference of a fine-tuned candidate, without what is memory of training data where that can be told."""
    memory = original.memory()
    if memory is None:
        return asdict(apart)
    trained = difference(original.metric, seen.trained_before, seen.trained_after, seed=payload["seed"])
    return {**asdict(without_memory(apart, trained, memory)), "drop_on_fold": apart.drop}


def trials_of(payload: Payload) -> list[Measured]:
    """What earlier trials measured, in their order."""
    digests = payload["stages"]["trial"]
    return [trial for digest in digests for trial in measured_in(digest, record(payload, digest).result)]


def goal_of(payload: Payload, before: float, base_macs: int) -> Goal:
    """The spec's goal in numbers: the drop that it allows, or the budget that it sets."""
    options = payload["options"]
    goal = options["goal"]
    if goal in ("smallest", "fastest"):
        limit = allowed_drop(before, payload["recipe"]["validate"]["max_drop"])
        return Goal(goal=goal, cost="bytes" if goal == "smallest" else "macs", limit=limit)
    if "macs" in options:
        return Goal(goal=goal, cost="macs", budget=options["macs"] * base_macs, share=options["macs"])
    if "latency_ms" in options:
        return Goal(goal=goal, cost="latency_ms", budget=options["latency_ms"])
    source = payload["model"]["files"][0]["bytes"]
    budget = options["size_bytes"] if "size_bytes" in options else source / options["compression_ratio"]
    return Goal(goal=goal, cost="bytes", budget=budget)
