"""One stream of binary decisions, each coded under a probability of its own, by the ANS coder of `constriction`.

Asymmetric numeral systems (Duda, arXiv 1311.2540) take within a fraction of a byte what the probabilities say. Writers
and readers have one interface, so that a model of the data is written once and drives both.
"""

from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
ONE = 1 << 16  # probabilities are whole numbers of 1/65536, from 1 to 65535

_COST_UNIT = 1 << 10  # costs are whole numbers, so that every machine chooses alike
_WORD = np.dtype("<u4")


class BitStream(Protocol):
    """Takes decisions, or gives them."""

    def code(self, ones: Integers, bits: Integers | None) -> Integers:
        """The decisions `bits` (0 or 1) under their chances `ones` / 65536 of being 1; a reader is given None."""
        ...


class BitWriter:
    """Collects decisions; `data` codes them all."""

    def __init__(self) -> None:
        self._ones: list[Integers] = []
        self._bits: list[Integers] = []

    def code(self, ones: Integers, bits: Integers | None) -> Integers:
        """Append decisions."""
        assert bits is not None, "a writer is told what to write"
        self._ones.append(ones)
        self._bits.append(bits)
        return bits

    def extend(self, other: "BitWriter") -> None:
        """Append all decisions of another writer."""
        self._ones += other._ones
        self._bits += other._bits

    def cost(self) -> int:
        """What the decisions take, in 1/1024 bits."""
        costs = _costs()
        chances = (
            np.where(bits == 1, ones, ONE - ones) for ones, bits in zip(self._ones, self._bits, strict=True)
        )
        return sum(int(costs[chance].sum()) for chance in chances)

    def data(self) -> bytes:
        """The coded decisions: nothing for none."""
        if not self._bits:
            return b""
        coder: Any = _coder()()
        bits, ones = np.concatenate(self._bits), np.concatenate(self._ones)
        coder.encode_reverse(bits.astype(np.int32), _model(), ones / ONE)
        words: NDArray[np.uint32] = coder.get_compressed()
        return words.astype(_WORD).tobytes().rstrip(b"\0")


class BitReader:
    """Gives the decisions back, in their order. Any bytes are decisions of some kind: compare a checksum.

    `words` and `place` (the coder's state, and how many words are left; each an array of one number) are for compiled
    code, which reads a stream by itself: use either these or `code`.
    """

    def __init__(self, data: bytes) -> None:
        padded = data + bytes(-len(data) % _WORD.itemsize)
        self.words: NDArray[np.uint32] = np.frombuffer(padded, _WORD).astype(np.uint32)
        if len(self.words) and not self.words[-1]:
            raise ValueError("its decisions end in a word of zeros")
        first = [int(word) for word in self.words[:-3:-1]]
        state = first[0] << 32 | first[1] if len(first) == 2 else sum(first)
        self.place = np.array([state], np.uint64), np.array([len(self.words) - len(first)], np.int64)
        self._decoder: Any = None

    def code(self, ones: Integers, bits: Integers | None = None) -> Integers:
        """The next decisions."""
        if self._decoder is None:  # no bytes were written for what was certain
            self._decoder = _coder()(self.words) if len(self.words) else _coder()()
        found: NDArray[np.int32] = self._decoder.decode(_model(), ones / ONE)
        return found.astype(np.int64)


@cache
def _coder() -> Any:
    import constriction  # its submodules are attributes only

    return constriction.stream.stack.AnsCoder


@cache
def _model() -> Any:
    import constriction

    return constriction.stream.model.Bernoulli(perfect=False)


@cache
def _costs() -> Integers:
    """What a decision of each chance takes, in 1/1024 bits."""
    chances = np.maximum(np.arange(ONE + 1, dtype=np.float64), 1) / ONE
    costs: Integers = np.rint(-np.log2(chances) * _COST_UNIT).astype(np.int64)
    return costs
