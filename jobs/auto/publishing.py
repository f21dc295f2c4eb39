"""The last step of a search: the best candidate, built on all train data, and a ladder if it does not pass.

Rungs are what was measured: each lost less on held-out train data than the one before it. What was backed off from,
and why, stands in the metrics.
"""

from collections.abc import Mapping
from typing import Any

from fleetpress.compression.cost import macs
from fleetpress.compression.errors import CompressionError

from ..errors import ModelError
from ..handover import Payload
from ..programs.materials import trained_program
from ..programs.publishing import publish as publish_candidate
from ..tasks import StepResult
from .chain import built
from .measured import Goal, Measured, front, is_good, ladder, refusals
from .trials import goal_of, trials_of


def publish(payload: Payload) -> StepResult:
    """Publish the first candidate of the ladder that passes validation; the last refusal if none does."""
    tried = trials_of(payload)
    trials = [trial for trial in tried if not trial.refused]
    if not trials:
        reasons = (
            "; ".join(dict.fromkeys(trial.refused for trial in tried))
            or "no layer can be quantized or pruned"
        )
        raise ModelError(
            f"{payload['model']['name']}: no candidate could be measured ({reasons}); give a recipe of your own"
        )
    goal = goal_of(payload, trials[0].before, macs(trained_program(payload)))
    backed_off: list[dict[str, Any]] = []
    answer: StepResult | None = None
    for rung in _rungs(payload, trials, goal):
        try:
            made = built(payload, rung.recipe)
        except CompressionError as error:  # what went well without a fold may diverge with it
            backed_off.append({"recipe": rung.recipe, "why": str(error)})
            continue
        told = {
            **_told(trials, rung, goal, backed_off),
            "refused": [{"recipe": trial.recipe, "why": trial.refused} for trial in tried if trial.refused],
        }
        own = {name: payload[name] for name in ("digest", "plan_digest")}
        answer = publish_candidate(
            {
                **made,
                **own,
                "asked": payload["recipe"],
                "told": {"search": told},
                "warnings": refusals(tried),
            }
        )
        if answer.result["state"] == "published":
            return answer
        backed_off.append({"recipe": rung.recipe, "why": answer.result["reason"]})
    if answer is None:
        raise ModelError(
            f"{payload['model']['name']}: no candidate could be built again: {backed_off[-1]['why']}"
        )
    return answer


def _rungs(payload: Payload, trials: list[Measured], goal: Goal) -> list[Measured]:
    """The ladder; with a share of a fleet's budget it begins there, and goes on with what lost less."""
    rungs = ladder(trials, goal)
    own = next((trial for trial in trials if trial.digest == payload.get("allotted")), None)
    if own is None:
        return rungs
    return [own, *(trial for trial in rungs if trial.digest != own.digest and trial.drop < own.drop)]


def _told(
    trials: list[Measured], chosen: Measured, goal: Goal, backed_off: list[dict[str, Any]]
) -> Mapping[str, Any]:
    """What the metrics say of the search: every trial, the Pareto front, the recipe that was taken."""
    best = {trial.digest for trial in front(trials, goal.cost)}
    return {
        "goal": goal.goal,
        "cost": goal.cost,
        "limit": goal.limit,
        "budget": goal.budget,
        "recipe": chosen.recipe,
        "backed_off": list(backed_off),
        "trials": [
            {
                "family": trial.family,
                "x": round(trial.x, 6),
                **{name: trial.costs[name] for name in sorted(trial.costs)},
                "drop": _short(trial.drop),
                "standard_error": _short(trial.standard_error),
                **_true(
                    is_good=is_good(trial, goal),
                    on_front=trial.digest in best,
                    is_chosen=trial.digest == chosen.digest,
                ),
            }
            for trial in trials
        ],
    }


def _true(**facts: bool) -> dict[str, bool]:
    """Only what is so: a search has many trials, and beside a small model every byte counts."""
    return {name: True for name, fact in facts.items() if fact}


def _short(value: float) -> float:
    """Six digits: more are noise, and bytes beside a small model."""
    return float(f"{value:.6g}")
