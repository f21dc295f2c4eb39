"""Wanda: a unit is unimportant if its weights, each times the strength of what it is multiplied with, are small."""

import torch
from torch import Tensor

from fleetpress.compression.errors import MethodError
from fleetpress.compression.program import aliases
from fleetpress.compression.pruning.method import PruningMethod, ScoreContext, added
from fleetpress.compression.pruning.units import UnitGroup


def score(context: ScoreContext, group: UnitGroup) -> Tensor:
    """Per unit sum_j |w_j| |x_j| over its rows, |x_j| the root mean square of the input that w_j is multiplied with.

    Added up over the layers of the group, biases left out. The paper takes the norm of x_j, which is the same up to a
    factor for the layer, and compares weights of one row; here whole rows are compared.
    """
    tied = aliases(context.values)
    sums: dict[str, Tensor] = {}
    for name in context.rows(group):
        layer = context.layers[name]
        inputs = context.inputs.get(tied.get(layer.weights[0], layer.weights[0]))
        if inputs is None:
            raise MethodError(
                f"wanda_structured needs statistics of what {name} reads ({layer.kind}); collect them (`calibrate`), "
                "and `ignore` kinds that have none, such as transposed convolutions"
            )
        rows = context.values[layer.weights[0]].detach().movedim(layer.axis, 0).flatten(1).double().abs()
        strengths = inputs.root_mean_square
        parts = zip(rows.chunk(inputs.groups), strengths, strict=True)
        sums[name] = torch.cat([part @ strength for part, strength in parts])
    return added(group, sums)


METHOD = PruningMethod(
    name="wanda_structured",
    summary="deletes units whose weights times the strength of their inputs are small; needs no gradients",
    paper="Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models (arXiv:2306.11695)",
    score=score,
    needs_inputs=True,
)
