"""Pruning in rounds: how much is gone after each of them, and which units of the original those are."""

from collections.abc import Mapping, Sequence


def share_after(sparsity: float, done: int, rounds: int) -> float:
    """The share that is gone after `done` of so many rounds: sparsity * (1 - (1 - done / rounds)^3).

    Zhu and Gupta 2017, To Prune, or Not to Prune (arXiv:1710.01878), equation 1 from a share of 0: much at first, when
    there is plenty, and ever less.
    """
    return sparsity if done == rounds else sparsity * (1 - (1 - done / rounds) ** 3)


def epochs_of(epochs: int, round_index: int, rounds: int) -> int:
    """Epochs of fine-tuning after a round: an equal part of all, the remainder to the last rounds, one each."""
    return epochs // rounds + (round_index >= rounds - epochs % rounds)


def composed(
    before: Mapping[str, Sequence[int]], removed: Mapping[str, Sequence[int]], totals: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The original's units that are gone after a round, by layer.

    `before` are those that were gone before it, `removed` those that it deletes, counted among what it found; `totals`
    are the original's numbers of units.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, count in totals.items():
        gone = set(before.get(name, ()))
        left = [index for index in range(count) if index not in gone]
        gone.update(left[index] for index in removed.get(name, ()))
        if gone:
            found[name] = tuple(sorted(gone))
    return found
