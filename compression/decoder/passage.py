"""Hidden states through a model block by block: from tokens to the first block, through each, and to the scores."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fleetpress.compression.decoder.skeleton import REMEDY, Skeleton
from fleetpress.compression.errors import DataMismatchError, ProgramError

BATCH_TOKENS = 4096  # that pass a block at once; more take memory and save no time


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences: `input_ids` int64 [N, T], `attention_mask` int64 [N, T] (1 = a token, 0 = padding), or None."""

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @property
    def kept(self) -> Tensor | None:
        """Which of the N * T positions hold tokens, bool [N * T]; None if all do."""
        if self.attention_mask is None or bool(self.attention_mask.all()):
            return None
        return self.attention_mask.bool().flatten()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def parts(self) -> Iterator[tuple[slice, "Batch"]]:
        """Runs of sequences of at most BATCH_TOKENS (at least one sequence), always the same ones."""
        count = max(1, BATCH_TOKENS // max(1, self.input_ids.shape[1]))
        for start in range(0, len(self), count):
            at = slice(start, start + count)
            mask = None if self.attention_mask is None else self.attention_mask[at]
            yield at, Batch(input_ids=self.input_ids[at], attention_mask=mask)


class _Arrived(Exception):
    """The block that was waited for was called."""


class _OtherKind(Exception):
    """The model hands on what blocks give in another way than was tried."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a block is called with: hidden states [N, T, H] and everything else."""

    hidden: Tensor
    args: tuple[Any, ...]
    options: dict[str, Any]


def embedded(skeleton: Skeleton, batch: Batch) -> Tensor:
    """The hidden states [N, T, H] that enter the first block; `skeleton.embed_only` comes first.

    Raises ProgramError for a model whose blocks are given more that depends on the embedded tokens.
    """
    return _called(skeleton, 0, batch).hidden.clone()


def check_independent(skeleton: Skeleton, batch: Batch) -> None:
    """Raises ProgramError if blocks are given more of the embedded tokens than their hidden states."""
    skeleton.embed_only(batch.input_ids)
    told = [_called(skeleton, index, batch) for index in range(len(skeleton.blocks))]
    skeleton.embed_nothing()
    for index, call in enumerate(told):
        blind = _called(skeleton, index, batch)
        if not _same((call.args, call.options), (blind.args, blind.options)):
            raise ProgramError(
                f"block {index} of {type(skeleton.model).__name__} reads more of the tokens than its hidden "
                f"states, so it cannot be run alone; {REMEDY}"
            )


def advanced(skeleton: Skeleton, index: int, batch: Batch, hidden: Tensor) -> Tensor:
    """The hidden states after the block `index`, whose weights are there; `skeleton.embed_nothing` comes first.

    Raises DataMismatchError for numbers that are not finite.
    """
    call = _called(skeleton, index, batch)
    with torch.no_grad():
        made = skeleton.blocks[index](hidden, *call.args, **call.options)
    after: Tensor = made if isinstance(made, Tensor) else made[0]
    kept = batch.kept
    rows = after.flatten(0, 1) if kept is None else after.flatten(0, 1)[kept]
    if not bool(rows.isfinite().all()):
        raise DataMismatchError(
            f"hidden states are not finite after block {index}; look for NaN or infinity in the weights"
        )
    return after


def scores(skeleton: Skeleton, batch: Batch, hidden: Tensor) -> Tensor:
    """What the model makes of the hidden states after its last block: logits [N, T, tokens]."""

    def answer(wrap: Callable[[Tensor], Any]) -> Any:
        def forward(_: int, call: Call) -> Any:
            return wrap(hidden)

        with _instead(skeleton.blocks, forward, batch):
            return skeleton.model(**_inputs(skeleton, batch))

    with torch.no_grad():
        found = _either(answer, skeleton)
    logits = getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise ProgramError(f"{type(skeleton.model).__name__} gives no scores of tokens; {REMEDY}")
    return logits


def _called(skeleton: Skeleton, index: int, batch: Batch) -> Call:
    """What the block `index` is called with, blocks before it handing on what they get."""
    seen: list[Call] = []

    def run(wrap: Callable[[Tensor], Any]) -> Any:
        def forward(number: int, call: Call) -> Any:
            if number == index:
                seen.append(call)
                raise _Arrived
            return wrap(call.hidden)

        with _instead(skeleton.blocks, forward, batch):
            try:
                skeleton.model(**_inputs(skeleton, batch))
            except _Arrived:
                return True
        return None

    with torch.no_grad():
        arrived = _either(run, skeleton)
    if not arrived:
        raise ProgramError(f"{type(skeleton.model).__name__} never calls its block {index}; {REMEDY}")
    return seen[-1]


def _either(run: Callable[[Callable[[Tensor], Any]], Any], skeleton: Skeleton) -> Any:
    """`run` with blocks that give tensors, or, where the model wants them so, tuples."""
    for wrap in (lambda hidden: hidden, lambda hidden: (hidden,)):
        try:
            return run(wrap)
        except _OtherKind:
            continue
    raise ProgramError(
        f"blocks of {type(skeleton.model).__name__} give something else than hidden states; {REMEDY}"
    )


def _inputs(skeleton: Skeleton, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    return inputs


@contextmanager
def _instead(
    blocks: Sequence[nn.Module], forward: Callable[[int, Call], Any], batch: Batch
) -> Iterator[None]:
    """Inside, `forward` is called in place of every block, with its number and what it was called with."""
    shape = tuple(batch.input_ids.shape)

    def stand_in(number: int) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            rest = dict(options)
            hidden = args[0] if args else rest.pop("hidden_states", None)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or tuple(hidden.shape[:2]) != shape:
                raise _OtherKind
            return forward(number, Call(hidden=hidden, args=args[1:], options=rest))

        return called

    try:
        for number, block in enumerate(blocks):
            block.forward = stand_in(number)
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is there again


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one is other or one == other)
