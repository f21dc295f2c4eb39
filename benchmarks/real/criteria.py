"""Pruning criteria side by side at equal multiply-accumulates, before and after the same fine-tuning.

    python benchmarks/real/criteria.py FOLDER [--nets digits-mlp ...] [--seeds 3]
    python benchmarks/real/criteria.py FOLDER --page ROOT

The first form measures, one thread, and adds every number to FOLDER/criteria-NET.json as it comes: begun again, it
goes on. The second makes docs/criteria/*.svg and the tables of docs/criteria.md below ROOT of what is measured so far.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import criteria_nets
import criteria_page
import torch
from results_file import Results
from torch.export import ExportedProgram

from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.cost import macs
from fleetpress.compression.errors import PruningError
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import with_tensors
from fleetpress.compression.pruning import PruneOptions, PruneResult, delete, prune
from fleetpress.compression.pruning.compensate import compensate, with_compensation
from fleetpress.compression.statistics import NeuronStatistics
from fleetpress.compression.training import collect, train

TRAINED = "gradient_stability (train)"
METHODS = ("gradient_stability", TRAINED, "taylor", "fisher", "wanda_structured", "magnitude", "random")
SCOPES = ("layer", "global", "global, by the mean")
_HALVINGS = 9  # of the sparsity: finer than one unit of the largest net here
_PARTS = 4
_CALIBRATION = 512  # samples


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A net of one seed, with everything that a criterion may look at."""

    program: ExportedProgram
    macs: int
    metric: float
    statistics: Mapping[str, NeuronStatistics]
    while_training: Mapping[str, NeuronStatistics] | None
    inputs: Mapping[str, InputStatistics]


def prepared(net: criteria_nets.Net, seed: int) -> Trained:
    """Train the net, or take it as it came, and collect what criteria need."""
    torch.manual_seed(seed)
    program, while_training = net.program(seed), None
    if net.training is not None:
        result = train(
            program, net.train_data, net.training, loss=net.loss, seed=seed, collect=True, products=True
        )
        assert result.statistics is not None
        program, while_training = with_tensors(program, result.values), result.statistics.neurons()
    statistics = collect(program, net.collect_data, 64, loss=net.loss, seed=seed, products=True)
    some = {name: value[:_CALIBRATION] for name, value in net.collect_data.items()}
    observed = calibrate(program, some, 64)
    return Trained(
        program=program,
        macs=macs(program),
        metric=net.measure(program),
        statistics=statistics.neurons(),
        while_training=while_training,
        inputs={name: item.inputs for name, item in observed.weights.items()},
    )


class Cutter:
    """Finds what a criterion deletes of one net at a share of its MACs."""

    def __init__(self, net: criteria_nets.Net, of: Trained, seed: int) -> None:
        self._net, self._of, self._seed = net, of, seed
        self._macs: dict[str, int] = {}  # by the numbers of units that went

    def at_share(self, method: str, scope: str, share: float) -> tuple[PruneResult, float]:
        """The choice whose MACs come nearest to `share` of the original's, by bisection on the sparsity; its share."""
        low, high, best = 0.0, 1.0, None
        for _ in range(_HALVINGS):
            sparsity = (low + high) / 2
            try:
                found = self._chosen(method, scope, sparsity)
            except PruningError:  # too small to delete anything
                low = sparsity
                continue
            got = self._share(found)
            if best is None or abs(got - share) < abs(best[1] - share):
                best = found, got
            low, high = (sparsity, high) if got > share else (low, sparsity)
        assert best is not None
        return best

    def _share(self, found: PruneResult) -> float:
        key = repr([(name, len(units)) for name, units in found.removed.items()])
        if key not in self._macs:
            self._macs[key] = macs(delete(self._of.program, found.removed))
        return self._macs[key] / self._of.macs

    def _chosen(self, method: str, scope: str, sparsity: float) -> PruneResult:
        options = PruneOptions(
            method="gradient_stability" if method == TRAINED else method,
            sparsity=sparsity,
            scope=scope.partition(",")[0],
            normalize="mean" if scope == SCOPES[2] else "none",
            targets=self._net.targets,
        )
        statistics = self._of.while_training if method == TRAINED else self._of.statistics
        return prune(self._of.program, options, statistics, seed=self._seed, inputs=self._of.inputs)


def measured(
    net: criteria_nets.Net, of: Trained, found: PruneResult, seed: int, *, tune: bool, mend: bool
) -> dict[str, Any]:
    """The metric after the deletion, and after fine-tuning; the same with what compensation makes of it."""
    smaller = delete(of.program, found.removed)
    row: dict[str, Any] = {"before": net.measure(smaller)}
    if tune:
        row["after"] = net.measure(_tuned(net, of, smaller, seed))
    if mend:
        for how in ("bias", "least_squares"):
            values = compensate(of.program, found.removed, of.inputs, how).values
            smaller = delete(with_compensation(of.program, values), found.removed)
            row[how] = net.measure(smaller)
        row["least_squares, after"] = net.measure(_tuned(net, of, smaller, seed))
    return row


def _tuned(net: criteria_nets.Net, of: Trained, program: ExportedProgram, seed: int) -> ExportedProgram:
    teacher = of.program if net.loss == "distillation" else None
    result = train(program, net.tune_data, net.tuning, loss=net.loss, seed=seed, teacher=teacher)
    return with_tensors(program, result.values)


class Course:
    """The way through one net: the most telling numbers of all seeds first."""

    def __init__(self, net: criteria_nets.Net, results: Results) -> None:
        self.net = net
        self._results = results
        self._trained: dict[int, Trained] = {}

    def run(self, seed: int, part: int) -> None:
        """All criteria of one part of what is wanted, for one seed."""
        wanted = {"|".join(map(str, (seed, *what))): what for what in _parts(self.net)[part]}
        wanted = {key: what for key, what in wanted.items() if key not in self._results.rows}
        if self.net.training is None:
            wanted = {key: what for key, what in wanted.items() if what[0] != TRAINED}
        if not wanted:
            return
        if seed not in self._trained:
            self._trained[seed] = prepared(self.net, seed)
        of = self._trained[seed]
        self._results.add(f"{seed}|unpruned", {"metric": of.metric, "macs": of.macs})
        cutter = Cutter(self.net, of, seed)
        for key, (method, scope, share) in wanted.items():
            found, got = cutter.at_share(method, scope, share)
            mend = scope == SCOPES[0] and seed == 0 and (self.net.thorough or share == self.net.shares[-1])
            row = measured(self.net, of, found, seed, tune=scope != SCOPES[2], mend=mend)
            self._results.add(key, {"macs": round(got, 4), **row})


def _parts(net: criteria_nets.Net) -> list[list[tuple[str, str, float]]]:
    """Criterion, scope and share of MACs. All scopes and shares only where that is quick."""
    layer, whole, mean = SCOPES
    parts = [
        [(layer, share) for share in net.shares[-1:]],
        [(layer, share) for share in net.shares[:-1]],
        [(whole, share) for share in (net.shares if net.thorough else net.shares[-1:])],
        [(mean, share) for share in net.shares if net.thorough],
    ]
    return [[(method, *place) for place in part for method in METHODS] for part in parts]


def main() -> None:
    """Measure, or make the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for packages and results; reused")
    parser.add_argument(
        "--nets", nargs="+", choices=sorted(criteria_nets.NETS), default=list(criteria_nets.NETS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", type=Path, metavar="ROOT")
    given = parser.parse_args()
    results = {name: Results(given.folder / f"criteria-{name}.json") for name in given.nets}
    if given.page is not None:
        criteria_page.write({name: one.rows for name, one in results.items()}, given.page)
        return
    torch.set_num_threads(1)  # the same sums everywhere
    courses = [Course(criteria_nets.NETS[name](given.folder), results[name]) for name in given.nets]
    for part in range(_PARTS):
        for seed in range(given.seeds):
            for course in courses:
                course.run(seed, part)


if __name__ == "__main__":
    main()
