"""The last step of a search: the best candidate, built on all train data, and a ladder if it does not pass.

Rungs are what was measured: each lost less on held-out train data than the one before it. Where two of them are far
apart, some that were not measured are made in between; below them is 8 bits in every layer. What was backed off from,
and why, stands in the metrics.
"""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from fleetpress.compression.cost import macs
from fleetpress.compression.errors import CompressionError

from ..errors import ModelError
from ..handover import Payload
from ..programs.materials import trained_program
from ..programs.publishing import publish as publish_candidate
from ..tasks import StepResult
from .candidates import last_resort, recipe_of
from .chain import built
from .ladder import between, ladder
from .measured import Goal, Measured, front, is_good, refusals
from .original import METHOD, Original
from .search import prices_of
from .sensing import table_of
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
    for recipe in _rungs(payload, trials, goal):
        try:
            made = built(payload, recipe)
        except CompressionError as error:  # what went well without a fold may diverge with it
            backed_off.append({"recipe": recipe, "why": str(error)})
            continue
        told = {
            **_told(trials, recipe, goal, backed_off),
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
        backed_off.append({"recipe": recipe, "why": answer.result["reason"]})
    if answer is None:
        raise ModelError(
            f"{payload['model']['name']}: no candidate could be built again: {backed_off[-1]['why']}"
        )
    return answer


def _rungs(payload: Payload, trials: list[Measured], goal: Goal) -> Iterator[Mapping[str, Any]]:
    """Recipes to try one after the other; with a share of a fleet's budget the ladder begins there, and goes on with
    what lost less. Where a drop is the bound, the last one is 8 bits in every layer.
    """
    rungs = ladder(trials, goal)
    own = next((trial for trial in trials if trial.digest == payload.get("allotted")), None)
    if own is not None:
        rungs = [own, *(trial for trial in rungs if trial.digest != own.digest and trial.drop < own.drop)]
    recipes = [trial.recipe for trial in trials]
    for rung, after in zip_longest(rungs, rungs[1:]):
        yield rung.recipe
        for recipe in _made_between(payload, rung, after, trials, goal) if after is not None else ():
            if recipe not in recipes:
                recipes.append(recipe)
                yield recipe
    last = last_resort(table_of(payload), METHOD)
    if goal.limit is not None and last not in [rung.recipe for rung in rungs]:
        yield last


def _made_between(
    payload: Payload, lower: Measured, upper: Measured, trials: list[Measured], goal: Goal
) -> Iterator[Mapping[str, Any]]:
    """Recipes between two rungs, made as the search would have made its next ones."""
    places = between(lower, upper, trials, goal)
    if not places:
        return
    table, searched = table_of(payload), Original(payload).searched()
    prices = prices_of(trials, goal, table)
    for family, x in places:
        recipe = recipe_of(family, x, table, searched, prices)
        if recipe is not None:
            yield recipe


def _told(
    trials: list[Measured], recipe: Mapping[str, Any], goal: Goal, backed_off: list[dict[str, Any]]
) -> Mapping[str, Any]:
    """What the metrics say of the search: every trial, the Pareto front, the recipe that was taken."""
    best = {trial.digest for trial in front(trials, goal.cost)}
    return {
        "goal": goal.goal,
        "cost": goal.cost,
        "limit": goal.limit,
        "budget": goal.budget,
        "recipe": recipe,
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
                    is_chosen=trial.recipe == recipe,
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
