"""Kinds of units that can be deleted, and what a reading of the graph has to allow for them."""

from collections.abc import Iterable
from dataclasses import dataclass

from fleetpress.compression.errors import MethodError

STRUCTURES = {
    "channel": "neurons and channels",
    "head": "whole attention heads; a key-value head goes with all its query heads",
    "head_dim": "the same entry of every head: of queries with keys, of values with the projection behind them",
    "recurrent": "hidden units of LSTM, GRU and RNN layers, the same ones in every layer and direction",
    "normalized": "channels that a layer, RMS or group norm mixes, such as a transformer's residual stream",
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a graph is read. Empty: channels and whatever an attention allows, heads if it can be; nothing else.

    `kinds` names structures: only then are hidden units and normalized channels free, and is a dim that an attention
    takes apart read as what was asked for.
    """

    kinds: tuple[str, ...] = ()

    @property
    def recurrent(self) -> bool:
        """Whether hidden units may go."""
        return "recurrent" in self.kinds

    @property
    def normalized(self) -> bool:
        """Whether channels may go whose statistics a norm takes."""
        return "normalized" in self.kinds

    @property
    def unwanted(self) -> str | None:
        """The way to take an attention apart that was not asked for."""
        if not self.kinds:
            return None
        return "head" if "head_dim" in self.kinds else "head_dim"


def reading(structure: Iterable[str]) -> Reading:
    """The reading for a choice of structures; raises MethodError for one that is unknown or does not fit another."""
    asked = tuple(structure)
    for kind in asked:
        if kind not in STRUCTURES:
            raise MethodError(f"structure {kind!r} is unknown; the structures are {', '.join(STRUCTURES)}")
    kinds = tuple(kind for kind in STRUCTURES if kind in asked)
    if "head" in kinds and "head_dim" in kinds:
        raise MethodError("structures head and head_dim take the same layers apart; keep one of them")
    return Reading(kinds=kinds)
