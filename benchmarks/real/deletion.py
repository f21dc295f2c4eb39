"""Fewer multiply-accumulates in a trained net, 1.5, 2 and 3 times, by deleting units: our criteria and torch-pruning's.

    python benchmarks/real/deletion.py FOLDER [--nets char-gpt ...] [--seeds N] [--only PATTERN] [--columns PATTERN]
        [--show]

The same nets and data as quantizers.py. For every way the sparsity is found by bisection whose MACs come nearest. Units
are channels, hidden units and attention heads; residual streams keep their width. `least_squares` refits what reads the
deleted units, where the outputs are nearer with it; `tuned` is one training of what is left, the same for both sides.
torch-pruning 1.6.1 prunes the module, which is then exported, tuned and measured as ours. In brackets stands the share
of MACs that is left. Numbers are kept in FOLDER/macs-NET.json.
"""

import time
from functools import partial

import deletion_peer
import side_by_side
from side_by_side import Case, Way
from torch.export import ExportedProgram

from fleetpress.compression.cost import macs
from fleetpress.compression.errors import PruningError
from fleetpress.compression.meter import Meter
from fleetpress.compression.program import with_tensors
from fleetpress.compression.pruning import PruneOptions, PruneResult, delete, prune
from fleetpress.compression.pruning.compensate import compensate, with_compensation
from fleetpress.compression.pruning.withdrawing import withdraw
from fleetpress.compression.training import collect, train

FEWER = {"1.5x": 1.5, "2x": 2.0, "3x": 3.0}
HALVINGS = 7
Made = tuple[ExportedProgram, float] | str


class Chooser:
    """What a criterion deletes of a net, at a share of its MACs."""

    def __init__(self, case: Case, method: str, scope: str) -> None:
        self._case, self._method, self._scope = case, method, scope
        self._inputs = {name: item.inputs for name, item in case.statistics.weights.items()}
        self._gradients = None
        if method in ("fisher", "taylor", "gradient_stability"):
            net = case.net
            data = net.tuning if net.loss == "causal_lm" else net.calibration
            some = {name: value[:256] for name, value in data.items()}
            found = collect(net.program, some, 32, loss=net.loss, seed=case.seed, products=True)
            self._gradients = found.neurons()

    def at(self, share: float) -> PruneResult:
        """The choice whose MACs come nearest to `share` of the original's."""
        whole, best = macs(self._case.net.program), None
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            sparsity = (low + high) / 2
            options = PruneOptions(
                method=self._method, sparsity=sparsity, scope=self._scope, normalize="mean"
            )
            try:
                found = prune(
                    self._case.net.program,
                    options,
                    self._gradients,
                    seed=self._case.seed,
                    inputs=self._inputs,
                )
            except PruningError:  # too small to delete anything
                low = sparsity
                continue
            got = macs(delete(self._case.net.program, found.removed)) / whole
            if best is None or abs(got - share) < abs(best[1] - share):
                best = found, got
            low, high = (sparsity, high) if got > share else (low, sparsity)
        assert best is not None
        return best[0]


def ours(
    case: Case,
    column: str,
    *,
    method: str,
    scope: str = "layer",
    mend: bool = False,
    by_importance: bool = False,
) -> Made:
    """The smaller program; what `mend` fits counts `by_importance` or alike."""
    known = case.read(by_importance=by_importance)
    start = time.process_time()
    program = case.net.program
    found = Chooser(case, method, scope).at(1 / FEWER[column])
    if mend:
        inputs = {name: item.inputs for name, item in known.items()}
        fitted = compensate(program, found.removed, inputs, "least_squares")
        meter = Meter(program, case.net.calibration)
        fitted = withdraw(program, found.removed, fitted, meter.increase_of)
        program = with_compensation(program, fitted.values)
    return delete(program, found.removed), time.process_time() - start


def theirs(case: Case, column: str, *, importance: str) -> Made:
    """torch-pruning's."""
    return deletion_peer.pruned(case, FEWER[column], importance)


def tuned(case: Case, column: str, *, of: str, way: Way) -> Made:
    """What a way made, trained."""
    key = f"{of}|{column}"
    start = time.process_time()
    if key not in case.made:
        begun = way(case, column)
        if isinstance(begun, str):
            return begun
        case.made[key] = begun[0]
    net, program = case.net, case.made[key]
    teacher = net.program if net.loss == "distillation" else None
    found = train(program, net.tuning, net.options, loss=net.loss, seed=case.seed, teacher=teacher)
    return with_tensors(program, found.values), time.process_time() - start


def kept(case: Case, column: str, *, of: str, way: Way) -> Made:
    """What a way makes, kept for the row that tunes it."""
    found = way(case, column)
    if not isinstance(found, str):
        case.made[f"{of}|{column}"] = found[0]
    return found


def share(case: Case, program: ExportedProgram) -> float:
    """Of the original's MACs."""
    return macs(program) / macs(case.net.program)


def _ways() -> dict[str, Way]:
    plain: dict[str, Way] = {
        "`magnitude` (naive floor)": partial(ours, method="magnitude"),
        "`wanda_structured`, least_squares": partial(ours, method="wanda_structured", mend=True),
        "`fisher`, least_squares": partial(ours, method="fisher", mend=True),
        "`fisher` global, least_squares": partial(ours, method="fisher", scope="global", mend=True),
        "`fisher` global, least_squares by importance": partial(
            ours, method="fisher", scope="global", mend=True, by_importance=True
        ),
        "torch-pruning, magnitude": partial(theirs, importance="magnitude"),
        "torch-pruning, magnitude, global": partial(theirs, importance="magnitude global"),
        "torch-pruning, Taylor": partial(theirs, importance="taylor"),
    }
    ways: dict[str, Way] = {}
    for label, way in plain.items():
        ways[label] = partial(kept, of=label, way=way)
        ways[f"{label}, tuned"] = partial(tuned, of=label, way=way)
    return ways


if __name__ == "__main__":
    side_by_side.run(__doc__, "macs", _ways(), list(FEWER), fact=share)
