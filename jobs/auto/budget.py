"""One budget for a whole fleet, shared by the solver that shares bits among the layers of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fleetpress.compression.allocation import Option, allocate
from fleetpress.compression.errors import MethodError
from fleetpress.compression.metrics import allowed_drop
from fleetpress.storage.store import ObjectStore

from ..errors import ModelError
from ..ledger import Ledger
from ..planning.plan import ModelPlan
from ..runs.figures import sized
from ..threads import side_by_side
from .measured import Goal, Measured, front, is_good, measured_in


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What all searched models together may take (`total_bytes`) or lose on average (`max_mean_drop`)."""

    total_bytes: int | None = None
    max_mean_drop: float | str | None = None


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The trials of one model, and the drop that its own recipe accepts."""

    trials: Sequence[Measured]
    max_drop: float | str

    def good(self) -> list[Measured]:
        """Those that the model may become: within its own limit, none beaten both ways by another."""
        limit = allowed_drop(self.trials[0].before, self.max_drop)
        goal = Goal(goal="smallest", cost="bytes", limit=limit)
        return front([trial for trial in self.trials if is_good(trial, goal)], "bytes")


def share(budget: Budget, models: Mapping[str, Candidates]) -> dict[str, Measured]:
    """One trial a model: the least drops (as shares of the accepted ones) within the bytes, or the fewest bytes within
    the mean drop. Models without a good trial are left out.

    A `max_mean_drop` in percent is a mean of drops as shares of each metric before. Raises ModelError when the budget
    is less than the smallest good trials take.
    """
    good = {name: trials for name, its in models.items() if its.trials and (trials := its.good())}
    if not good:
        return {}
    options = [
        [
            Option(cost=trial.costs["bytes"], increase=_lost(trial, models[name].max_drop))
            if budget.total_bytes is not None
            else Option(cost=_drop(trial, budget.max_mean_drop), increase=trial.costs["bytes"])
            for trial in trials
        ]
        for name, trials in good.items()
    ]
    limit = budget.total_bytes if budget.total_bytes is not None else len(good) * _mean(budget.max_mean_drop)
    try:
        chosen = allocate(options, limit)
    except MethodError:
        least = sum(min(option.cost for option in some) for some in options)
        if budget.total_bytes is not None:
            told = f"{sized(least)}, more than fleet.total_bytes {sized(budget.total_bytes)}"
        else:
            told = f"{least / len(good):.4g} on average, more than fleet.max_mean_drop {budget.max_mean_drop}"
        raise ModelError(
            f"the best that was found for the fleet still costs {told}; raise it, or allow more trials or drop"
        ) from None
    return {name: trials[index] for (name, trials), index in zip(good.items(), chosen, strict=True)}


def _lost(trial: Measured, max_drop: float | str) -> float:
    """The drop's bound as a share of the accepted drop, so that metrics of all kinds add up."""
    accepted = allowed_drop(trial.before, max_drop)
    return max(0.0, trial.bound) / accepted if accepted else max(0.0, trial.bound)


def _drop(trial: Measured, unit: float | str | None) -> float:
    """The drop, in the unit in which the mean is given."""
    whole = abs(trial.before) if isinstance(unit, str) else 1.0
    return max(0.0, trial.drop) / whole if whole else 0.0


def _mean(limit: float | str | None) -> float:
    assert limit is not None
    return allowed_drop(1.0, limit)


def shared_plans(
    left: Sequence[ModelPlan], there: Sequence[ModelPlan], store: ObjectStore, budget: Budget
) -> list[ModelPlan]:
    """The plans that are `left`, each told which trial its model is to become; `there` are published ones, whose trials
    count, too. Raises ModelError as `share`.
    """
    plans = [*there, *left]
    found = side_by_side(lambda plan: _candidates(plan, Ledger(store)), plans)
    chosen = share(budget, {plan.model.name: its for plan, its in zip(plans, found, strict=True)})
    return [_told(plan, chosen.get(plan.model.name)) for plan in left]


def _candidates(plan: ModelPlan, ledger: Ledger) -> Candidates:
    trials = []
    for task in plan.tasks:
        if task.kind == "trial" and (record := ledger.read(task.digest)) is not None:
            trials += [trial for trial in measured_in(task.digest, record.result) if not trial.refused]
    return Candidates(trials=trials, max_drop=plan.model.recipe.validation.max_drop)


def _told(plan: ModelPlan, trial: Measured | None) -> ModelPlan:
    """A model without a good trial takes its own ladder: what it becomes may still pass."""
    if trial is None:
        return plan
    *tasks, last = plan.tasks
    return replace(plan, tasks=(*tasks, replace(last, payload={**last.payload, "allotted": trial.digest})))
