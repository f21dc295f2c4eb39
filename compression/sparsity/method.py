"""What a method of zeroing weights is: a table entry that knows from headers what it will do, and does it in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True, kw_only=True)
class SparsityMethod:
    """`check` raises MethodError for options that it cannot work with; the others expect options that passed.

    `reason_against(options, dtype, shape)` says why a weight must be left alone, None if it need not. `passes(options,
    dtype)` is how often all of it is measured before it is zeroed, `zeroed(options, shape)` how many of its entries are
    chosen: those are zero afterwards, and any others that were. `start(options, dtype, shape)` begins with a weight.
    Dtypes are safetensors' names; the last dimension of a shape is a row.
    """

    name: str
    summary: str
    paper: str
    takes: tuple[str, ...]
    check: Callable[[Options], None]
    reason_against: Callable[[Options, str, Sequence[int]], str | None]
    passes: Callable[[Options, str], int]
    zeroed: Callable[[Options, Sequence[int]], int]
    start: Callable[[Options, str, Sequence[int]], Zeroing]
