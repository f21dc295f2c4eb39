"""Take compensation back where it does not help: each layer was fitted alone, and to squared errors.

A fit follows the largest numbers that a layer reads, which need not be what the outputs depend on: in transformers a
few tokens hold far larger ones than all others (Sun et al. 2024, Massive Activations in Large Language Models,
arXiv:2402.17762), and a deleted unit that was large for these alone is then made up for at the cost of the rest.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.export import ExportedProgram

from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.pruning.compensate import Compensation, with_compensation
from fleetpress.compression.pruning.delete import delete

_NEARER = 0.99  # of the distance: by less the order of a sum may decide
WITHDRAWN = "the model's outputs stay nearer to what they were without it"


def withdraw(
    program: ExportedProgram,
    removed: Mapping[str, Sequence[int]],
    found: Compensation,
    increase: Callable[[ExportedProgram], float],
    structure: Sequence[str] = (),
) -> Compensation:
    """What is left of `found` if every layer, in the program's order, goes back to what it held where that is better.

    `increase` tells how far the outputs of the smaller program are from those of `program`. It is asked once, and once
    more for each compensated layer. Layers that went back are among the skipped ones.
    """
    if not found.corrected:
        return found
    given = tensors(delete(program, removed, structure))
    best = delete(with_compensation(program, found.values), removed, structure)
    least, held = increase(best), tensors(best)
    corrected, skipped = dict(found.corrected), dict(found.skipped)
    for layer, mine in found.corrected.items():
        before = {
            name: given[name] if name in given else torch.zeros_like(held[name])  # a bias that there was not
            for name in mine
            if name in held
        }
        without = with_tensors(best, before)
        measured = increase(without)
        if measured < _NEARER * least:
            best, least = without, measured
            del corrected[layer]
            skipped[layer] = WITHDRAWN
    return Compensation(corrected=corrected, skipped=skipped)
