"""One candidate: built without a fold of the train data, measured on that fold, fold by fold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import evenly
from fleetpress.compression.confidence import difference, sample_sums, value_of
from fleetpress.compression.cost import macs, parameters
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.metrics import Sums, allowed_drop

from ..handover import Payload, record
from ..planning.fleet import Fold
from ..programs.assembling import assembled
from ..programs.materials import (
    arrays,
    remembered,
    trained_program,
)
from ..programs.objective import (
    is_fidelity,
    loss_name,
    measured,
    metric_name,
)
from ..programs.publishing import call_ms
from ..tasks import StepResult
from .candidates import Searched
from .chain import built
from .search import Goal, Measured, measured_in, propose
from .sensing import table_of

MOST_SAMPLES = 6144  # of all folds together that a candidate is measured on
_METHOD = "gptq"
_RATES = ((2_000_000, 2e-3), (10_000_000, 5e-4), (math.inf, 1e-4))  # learning rates up to so many parameters


def trial(payload: Payload) -> StepResult:
    """Measure the `index`-th candidate that the trials of earlier rounds make worth it; nothing if there is none."""
    history, base = trials_of(payload), _Base(payload)
    searched = base.searched()
    goal = goal_of(payload, base.value(), macs(base.program))
    wanted = propose(history, goal, table_of(payload), searched, payload["index"] + 1)
    if len(wanted) <= payload["index"]:
        return StepResult(result={"skipped": "no other candidate is worth a trial"})
    family, x, recipe = wanted[payload["index"]]
    options = payload["options"]
    # One fold is enough for what was trained on the others: to train it again for each costs as much as the search.
    folds = 1 if "finetune" in recipe else options["folds"]
    before: list[Sums] = []
    after: list[Sums] = []
    costs: dict[str, float] = {}
    for index in range(folds):
        fold = Fold(index=index, of=options["folds"])
        try:
            made = built(payload, recipe, Fold(index=index, of=options["folds"], is_left_out=True))
            found = assembled(made)
        except CompressionError as error:  # a net without units to delete, a training that diverged ...
            return StepResult(result={"family": family, "x": x, "recipe": recipe, "refused": str(error)})
        before += base.sums(fold)
        after += base.sums_of(found.served, fold)
        if not costs:
            costs = {"bytes": len(found.data), "macs": macs(found.plain)}
            if goal.cost == "latency_ms":
                costs["latency_ms"] = call_ms(Runner(found.served))
    apart = difference(base.metric, before, after, seed=payload["seed"])
    tried = {"family": family, "x": x, "recipe": recipe}
    if not all(map(math.isfinite, vars(apart).values())):
        why = f"{base.metric} went from {apart.before:g} to {apart.after:g}"
        return StepResult(result={**tried, "refused": why})
    return StepResult(result={**tried, "costs": costs, "metric": base.metric, **asdict(apart)})


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


class _Base:
    """The model before compression, measured on folds of the train data; what it gave is kept in this process."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self.program = trained_program(payload)
        self._runner = Runner(self.program)
        samples = arrays(payload["data"]["train"][:1])
        self._loss = loss_name(payload["data"], samples)
        self.metric = metric_name(payload["data"], measured(payload["data"], samples), self.program)

    def searched(self) -> Searched:
        """What the recipes of the search are made of. Large nets are trained in small steps."""
        size = parameters(self.program)
        return Searched(
            epochs=self._payload["options"]["epochs"],
            method=_METHOD,
            lr=next(lr for most, lr in _RATES if size <= most),
            is_labelled=self._loss != "distillation",
        )

    def value(self) -> float:
        """The metric on all folds."""
        of = self._payload["options"]["folds"]
        sums = [item for index in range(of) for item in self.sums(Fold(index=index, of=of))]
        return value_of(self.metric, sums)

    def sums(self, fold: Fold) -> Sequence[Sums]:
        """The metric's sums of the fold's samples."""
        key = f"base-{self._payload['stages'].get('train') or self._payload['model']['files'][0]['etag']}"
        key += f"-{self.metric}-{fold}-{[file['etag'] for file in self._payload['data']['train']]}"
        return remembered(key, lambda: self.sums_of(self.program, fold))

    def sums_of(self, program: ExportedProgram, fold: Fold) -> list[Sums]:
        """The same of another program."""
        runner = self._runner if program is self.program else Runner(program)
        reference = self._runner if is_fidelity(self.metric) else None
        return sample_sums(runner, self._samples(fold), self.metric, reference=reference)

    def _samples(self, fold: Fold) -> Mapping[str, Tensor]:
        files = [{**file, "fold": dict(vars(fold))} for file in self._payload["data"]["train"]]
        return evenly(measured(self._payload["data"], arrays(files)), -(-MOST_SAMPLES // fold.of))
