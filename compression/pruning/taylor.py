"""Taylor: a unit is unimportant if the loss hardly feels its gate, to first order."""

from torch import Tensor

from fleetpress.compression.errors import MethodError
from fleetpress.compression.pruning.method import PruningMethod, ScoreContext, added, collected
from fleetpress.compression.pruning.units import UnitGroup


def score(context: ScoreContext, group: UnitGroup) -> Tensor:
    """Per unit E[(sum_j w_j g_j)^2] over the batches, added up over the layers of the group; squared loss units.

    The sum runs over the unit's row and bias; where a normalization follows, over its scale and shift instead. It is
    the gradient by a gate on the unit's output: equation 8 of the paper for the gate as the one parameter.
    """
    squares: dict[str, Tensor] = {}
    for name, item in collected(context, group, METHOD.name).items():
        if item.gate_square is None:
            raise MethodError(
                f"the gradient statistics of {name} lack products; collect them with `products`"
            )
        squares[name] = item.gate_square
    return added(group, squares)


METHOD = PruningMethod(
    name="taylor",
    summary="deletes units whose removal changes the loss least, by its first-order expansion",
    paper="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning (arXiv:1906.10771), with gates",
    score=score,
    needs_gradients=True,
    needs_products=True,
)
