"""One candidate: built without a fold of the train data, measured on that fold, fold by fold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import count, evenly
from fleetpress.compression.confidence import difference, sample_sums, value_of, without_memory
from fleetpress.compression.cost import macs, parameters, sample_macs
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.evaluation import Runner, all_outputs
from fleetpress.compression.metrics import METRICS, Sums, allowed_drop, drop
from fleetpress.compression.outputs import meaning
from fleetpress.compression.sensitivity import divergence

from ..handover import Payload, record
from ..planning.fleet import Fold
from ..planning.plan import TRIALS_AT_ONCE
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
from .chain import built
from .choices import Searched
from .effort import effort
from .joint import expected_of
from .search import Goal, Measured, measured_in, propose
from .sensing import table_of

MOST_SAMPLES = 6144  # of all folds together that a candidate is measured on
_DIVERGING = 256  # samples that tell how far outputs moved
_KEPT_BYTES = 1 << 26  # of the outputs of a fold
_METHOD = "gptq"
_RATES = ((2_000_000, 2e-3), (10_000_000, 5e-4), (math.inf, 1e-4))  # learning rates up to so many parameters


def trial(payload: Payload) -> StepResult:
    """Measure the `index`-th candidate that the trials of earlier rounds make worth it; nothing if there is none."""
    history, base = trials_of(payload), _Base(payload)
    searched = base.searched()
    goal = goal_of(payload, base.value(), macs(base.program))
    table = table_of(payload)
    wanted = remembered(
        f"wanted-{payload['stages']['sense']}-{payload['stages']['trial']}-{goal}-{searched}",
        lambda: propose(history, goal, table, searched, TRIALS_AT_ONCE),
    )
    if len(wanted) <= payload["index"]:
        return StepResult(result={"skipped": "no other candidate is worth a trial"})
    family, x, recipe = wanted[payload["index"]]
    options = payload["options"]
    is_tuned = "finetune" in recipe
    folds = searched.folds if is_tuned else options["folds"]
    before: list[Sums] = []
    after: list[Sums] = []
    seen_before: list[Sums] = []  # of samples that the candidate was fine-tuned on
    seen_after: list[Sums] = []
    costs: dict[str, float] = {}
    divergence = 0.0
    for index in range(folds):
        fold = Fold(index=index, of=options["folds"])
        try:
            made = built(payload, recipe, Fold(index=index, of=options["folds"], is_left_out=True))
            found = assembled(made)
        except CompressionError as error:  # a net without units to delete, a training that diverged ...
            return StepResult(result={"family": family, "x": x, "recipe": recipe, "refused": str(error)})
        before += base.sums(fold, of=folds)
        after += base.sums_of(found.served, fold, of=folds)
        if is_tuned:
            other = Fold(index=(index + 1) % fold.of, of=fold.of)
            seen_before += base.sums(other, of=folds)
            seen_after += base.sums_of(found.served, other, of=folds)
        if not costs:
            divergence = base.divergence(found.served, fold)
            costs = {"bytes": len(found.data), "macs": macs(found.plain)}
            if goal.cost == "latency_ms":
                costs["latency_ms"] = call_ms(Runner(found.served))
    apart = difference(base.metric, before, after, seed=payload["seed"])
    tried: dict[str, Any] = {"family": family, "x": x, "recipe": recipe}
    if not all(map(math.isfinite, vars(apart).values())):
        why = f"{base.metric} went from {apart.before:g} to {apart.after:g}"
        return StepResult(result={**tried, "refused": why})
    told = asdict(apart)
    if is_tuned and goal.cost == "bytes":
        tried["expected"] = expected_of(recipe, table)
    if is_tuned or "prune" in recipe:
        tried["divergence"] = divergence
    if is_tuned and (memory := base.memory()) is not None:
        seen = difference(base.metric, seen_before, seen_after, seed=payload["seed"])
        told = {**asdict(without_memory(apart, seen, memory)), "drop_on_fold": apart.drop}
    return StepResult(result={**tried, "costs": costs, "metric": base.metric, **told})


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
        self._count = count(samples) * len(payload["data"]["train"])
        self._macs = sample_macs(self.program, samples)
        self._loss = loss_name(payload["data"], samples)
        self.metric = metric_name(payload["data"], measured(payload["data"], samples), self.program)

    def searched(self) -> Searched:
        """What the recipes of the search are made of. Large nets are trained in small steps."""
        size, options = parameters(self.program), self._payload["options"]
        given = effort(self._count, self._macs, folds=options["folds"], epochs=options.get("epochs"))
        return Searched(
            epochs=given.epochs,
            batch_size=given.batch_size,
            folds=given.folds,
            method=_METHOD,
            lr=next(lr for most, lr in _RATES if size <= most),
            is_labelled=self._loss != "distillation",
        )

    def value(self) -> float:
        """The metric on all folds."""
        of = self._payload["options"]["folds"]
        sums = [item for index in range(of) for item in self.sums(Fold(index=index, of=of), of=of)]
        return value_of(self.metric, sums)

    def memory(self) -> float | None:
        """By how much the model before is worse on eval data than on the folds; None where that cannot be told."""
        data = self._payload["data"]
        if not data["eval"] or METRICS[self.metric].needs != "targets":
            return None
        unseen = remembered(
            f"unseen-{self._key}-{[file['etag'] for file in data['eval']]}",
            lambda: sample_sums(
                self._runner, evenly(measured(data, arrays(data["eval"])), MOST_SAMPLES), self.metric
            ),
        )
        return drop(self.metric, self.value(), value_of(self.metric, unseen))

    def divergence(self, program: ExportedProgram, fold: Fold) -> float:
        """How far the outputs moved on some of the fold's samples, in the unit of the expected increases."""
        samples = evenly(self._samples(fold, 1), _DIVERGING)
        before = remembered(f"diverging-{self._key_of(fold)}", lambda: all_outputs(self._runner, samples))
        return divergence(before, all_outputs(Runner(program), samples), meaning(self.program))

    def sums(self, fold: Fold, *, of: int) -> Sequence[Sums]:
        """The metric's sums of the fold's samples, which are one of so many parts of all that are looked at."""
        return remembered(f"base-{self._key_of(fold)}-{of}", lambda: self.sums_of(self.program, fold, of=of))

    @property
    def _key(self) -> str:
        stages, files = self._payload["stages"], self._payload["model"]["files"]
        return f"{stages.get('train') or files[0]['etag']}-{self.metric}"

    def _key_of(self, fold: Fold) -> str:
        return f"{self._key}-{fold}-{[file['etag'] for file in self._payload['data']['train']]}"

    def sums_of(self, program: ExportedProgram, fold: Fold, *, of: int) -> list[Sums]:
        """The same of another program."""
        runner = self._runner if program is self.program else Runner(program)
        samples = self._samples(fold, of)
        reference = None
        if is_fidelity(self.metric):
            reference = runner if runner is self._runner else self._expected(fold, of, samples)
        return sample_sums(runner, samples, self.metric, reference=reference)

    def _expected(self, fold: Fold, of: int, samples: Mapping[str, Tensor]) -> Runner | Tensor:
        """What candidates are compared with: outputs that are kept, or the model where they are too many."""
        some = all_outputs(self._runner, evenly(samples, 1))
        if some.nbytes * count(samples) > _KEPT_BYTES:
            return self._runner
        key = f"outputs-{self._key_of(fold)}-{of}"
        return remembered(key, lambda: all_outputs(self._runner, samples))

    def _samples(self, fold: Fold, of: int) -> Mapping[str, Tensor]:
        files = [{**file, "fold": dict(vars(fold))} for file in self._payload["data"]["train"]]
        return evenly(measured(self._payload["data"], arrays(files)), -(-MOST_SAMPLES // of))
