"""Fisher: a unit is unimportant if setting its weights to zero changes the loss little, to second order."""

from torch import Tensor

from fleetpress.compression.errors import MethodError
from fleetpress.compression.pruning.method import PruningMethod, ScoreContext, added, collected
from fleetpress.compression.pruning.units import UnitGroup


def score(context: ScoreContext, group: UnitGroup) -> Tensor:
    """Per unit 1/2 sum_j w_j^2 F_jj over its rows and biases, F_jj = E[g_j^2] over the batches; loss units.

    The Hessian of the loss is taken to be the empirical Fisher matrix, and that to be diagonal: every weight alone,
    where `taylor` looks at the unit as one.
    """
    halves: dict[str, Tensor] = {}
    for name, item in collected(context, group, METHOD.name).items():
        if item.product_square is None:
            raise MethodError(
                f"the gradient statistics of {name} lack products; collect them with `products`"
            )
        halves[name] = item.product_square / 2
    return added(group, halves)


METHOD = PruningMethod(
    name="fisher",
    summary="deletes units whose weights matter least to the loss, by the diagonal of the Fisher matrix",
    paper="Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning (arXiv:1801.05787)",
    score=score,
    needs_gradients=True,
    needs_products=True,
)
