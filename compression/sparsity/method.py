"""What a method of zeroing weights is: a table entry that knows from headers what it will do, and does it in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from fleetpress.compression.calibration import InputStatistics
    from fleetpress.compression.weight_gradients import WeightMoments

Options = Mapping[str, Any]  # of a recipe's `prune` step: `pattern` or `sparsity`


class Zeroing(Protocol):
    """One weight on its way: every measuring pass sees all its blocks, in order, then `apply` gets them, in order.

    Blocks are contiguous tensors of whole rows; their size does not change the result. A copy (`copy.deepcopy`) goes
    its own way from there.
    """

    def measure(self, rows: Tensor) -> None:
        """Looks at the next block of a measuring pass."""
        ...

    def end_pass(self) -> None:
        """Every block has been measured."""
        ...

    def apply(self, rows: Tensor) -> Tensor:
        """The next block, with weights zeroed in place."""
        ...


class ZeroRows(Protocol):
    """`rows` [output units, entries] with those that go zeroed, as a new tensor; `inputs` are what they multiply."""

    def __call__(self, rows: Tensor, options: Options, inputs: InputStatistics) -> Tensor:
        """The rows of one weight, or of one group of a convolution. Raises MethodError if numbers do not allow it."""
        ...


class ScoreWeights(Protocol):
    """How much every entry of `weight` matters, float64: low = unimportant. Entry by entry, in any shape."""

    def __call__(self, weight: Tensor, gradients: WeightMoments) -> Tensor:
        """The scores of one weight from the moments of its gradients."""
        ...


@dataclass(frozen=True, kw_only=True)
class SparsityMethod:
    """`check` raises MethodError for options that it cannot work with; the others expect options that passed.

    `reason_against(options, dtype, shape)` says why a weight must be left alone, None if it need not. `zeroed(options,
    shape)` is how many of its entries are chosen (at least, if the method needs data): those are zero afterwards, and
    any others that were. `takes` names its options: of two, a recipe gives one. Dtypes are safetensors' names; the last
    dimension of a shape is a row.

    A method that needs no data has `start(options, dtype, shape)`, which begins with a weight, and `passes(options,
    dtype)`, how often all of it is measured before it is zeroed; `compares_tensors` says that its measure means the
    same in every tensor, so that scope global may rank all of them together. One that looks at what layers read has
    `zero_rows` instead; `moves_weights` says that it changes weights that it keeps, too. One that looks at gradients
    has a `score`; `expands_loss` says that it expands the loss around the weights at hand, so that gradients of their
    training do not do: they have to be collected at these weights.
    """

    name: str
    summary: str
    paper: str
    takes: tuple[str, ...]
    check: Callable[[Options], None]
    reason_against: Callable[[Options, str, Sequence[int]], str | None]
    zeroed: Callable[[Options, Sequence[int]], int]
    passes: Callable[[Options, str], int] | None = None
    start: Callable[[Options, str, Sequence[int]], Zeroing] | None = None
    compares_tensors: bool = False
    zero_rows: ZeroRows | None = None
    moves_weights: bool = False
    score: ScoreWeights | None = None
    expands_loss: bool = False

    @property
    def needs_inputs(self) -> bool:
        """Whether it looks at what layers read: of a model with data only."""
        return self.zero_rows is not None

    @property
    def needs_gradients(self) -> bool:
        """Whether it looks at gradients of single weights: of a program with data only."""
        return self.score is not None
