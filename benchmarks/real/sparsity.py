"""Zeros in a trained net, 30 to 90 % of every layer's weights, by our methods and llm-compressor's.

    python benchmarks/real/sparsity.py FOLDER [--nets char-gpt ...] [--peer PYTHON] [--seeds N]
        [--only PATTERN] [--columns PATTERN] [--show]

The same nets, layers, data and environment as quantizers.py. Gradients are those of as many samples as calibrate
the others, in batches of the tuning's size, or one by one (`by sample`). `tuned` is a short training of what is left,
the zeros kept, the same for every method; `gradual` lets the zeros grow during a training of that length. Numbers are
kept in FOLDER/zeros-NET.json.
"""

import time
from functools import partial

import peers
import side_by_side
from side_by_side import Case, Way
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.gradual import GradualOptions
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.sparsity import SPARSIFIERS
from fleetpress.compression.sparsity.zero_layers import zero_layers
from fleetpress.compression.training import train
from fleetpress.compression.weight_gradients import WeightMoments

AMOUNTS = {"30 %": 0.3, "50 %": 0.5, "70 %": 0.7, "90 %": 0.9}
Made = tuple[ExportedProgram, float] | str
_gradients: dict[tuple[str, int, int], dict[str, WeightMoments]] = {}


def gradients(case: Case, batch_size: int) -> dict[str, WeightMoments]:
    """Moments of the gradients of the net's weights, collected once."""
    key = (case.net.name, case.seed, batch_size)
    if key not in _gradients:
        _gradients[key] = case.net.gradients(batch_size)
    return _gradients[key]


def ours(
    case: Case,
    column: str,
    *,
    method: str,
    by_sample: bool = False,
    by_importance: bool = False,
    **others: str,
) -> Made:
    """The program with zeros."""
    known = case.read(by_importance=by_importance)
    needed = SPARSIFIERS[method].needs_gradients
    found = gradients(case, 1 if by_sample else case.net.options.batch_size) if needed else {}
    start = time.process_time()
    chosen = list(dict.fromkeys(layer for layer, _ in peers.chosen(case)))
    options = {"method": method, "sparsity": AMOUNTS[column], **others}
    made = zero_layers(chosen, tensors(case.net.program), options, known, found)
    values = {name: weight.values for name, weight in made.weights.items()}
    return with_tensors(case.net.program, values), time.process_time() - start


def theirs(case: Case, column: str, *, method: str) -> Made:
    """A peer's program with zeros."""
    return peers.by_layers(case, method, sparsity=AMOUNTS[column])


def tuned(case: Case, column: str, *, way: Way) -> Made:
    """What a way made, trained, its zeros kept."""
    begun = way(case, column)
    assert not isinstance(begun, str)
    start = time.process_time()
    values = tensors(begun[0])
    masks: dict[str, Tensor] = {name: values[name] != 0 for _, name in peers.chosen(case)}
    return _trained(case, begun[0], masks, None), begun[1] + time.process_time() - start


def gradual(case: Case, column: str) -> Made:
    """Zeros that grow over the first half of the training."""
    start = time.process_time()
    names = tuple(dict.fromkeys(name for _, name in peers.chosen(case)))
    options = GradualOptions(weights=names, sparsity=AMOUNTS[column], interval=4)
    return _trained(case, case.net.program, {}, options), time.process_time() - start


def _trained(
    case: Case, program: ExportedProgram, masks: dict[str, Tensor], grows: GradualOptions | None
) -> ExportedProgram:
    net = case.net
    teacher = net.program if net.loss == "distillation" else None
    made = train(
        program,
        net.tuning,
        net.options,
        loss=net.loss,
        seed=case.seed,
        teacher=teacher,
        masks=masks,
        gradual=grows,
    )
    return with_tensors(program, made.values)


def _ways() -> dict[str, Way]:
    floor = partial(ours, method="magnitude_unstructured")
    ways: dict[str, Way] = {
        "`magnitude_unstructured` (naive floor)": floor,
        "`magnitude_unstructured`, global": partial(ours, method="magnitude_unstructured", scope="global"),
        "`wanda`": partial(ours, method="wanda"),
        "`sparsegpt`": partial(ours, method="sparsegpt"),
        "`sparsegpt`, by importance": partial(ours, method="sparsegpt", by_importance=True),
        "llm-compressor 0.14, Wanda": partial(theirs, method="wanda"),
        "llm-compressor 0.14, SparseGPT": partial(theirs, method="sparsegpt"),
    }
    for method in (name for name, entry in SPARSIFIERS.items() if entry.needs_gradients):
        ways[f"`{method}`"] = partial(ours, method=method)
        ways[f"`{method}`, global"] = partial(ours, method=method, scope="global")
    fisher = partial(ours, method="fisher_unstructured")
    ways["`fisher_unstructured`, by sample"] = partial(fisher, by_sample=True)
    ways["`fisher_unstructured`, global, by sample"] = partial(fisher, by_sample=True, scope="global")
    ways["`fisher_unstructured`, global, normalized"] = partial(fisher, scope="global", normalize="mean")
    for name in [name for name in ways if not name.startswith("llm-compressor")]:
        # Under its short name, as before there were others.
        ways[f"{name.removesuffix(' (naive floor)')}, tuned"] = partial(tuned, way=ways[name])
    ways["llm-compressor 0.14, SparseGPT, tuned"] = partial(tuned, way=ways["llm-compressor 0.14, SparseGPT"])
    ways["`magnitude_unstructured`, gradual"] = gradual
    return ways


if __name__ == "__main__":
    side_by_side.run(__doc__, "zeros", _ways(), list(AMOUNTS))
