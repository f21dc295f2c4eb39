"""Schedules of pruning: shares, epochs and indices of the rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.compression.rounds import composed, epochs_of, share_after


def test_shares_follow_the_cubic_rule() -> None:
    """Equation 1 of Zhu and Gupta 2017 from 0, with the time counted in rounds."""
    wanted = [0.8 + (0.0 - 0.8) * (1 - done / 4) ** 3 for done in (1, 2, 3, 4)]
    assert [share_after(0.8, done, 4) for done in (1, 2, 3, 4)] == pytest.approx(wanted)
    assert share_after(0.7, 3, 3) == 0.7


@given(rounds=st.integers(1, 20), more=st.integers(0, 50))
def test_all_epochs_are_used_and_every_round_has_one(rounds: int, more: int) -> None:
    parts = [epochs_of(rounds + more, index, rounds) for index in range(rounds)]
    assert sum(parts) == rounds + more
    assert min(parts) >= 1
    assert parts == sorted(parts)
    assert max(parts) - min(parts) <= 1


@given(st.integers(1, 30), st.lists(st.sets(st.integers(0, 29), max_size=6), max_size=4))
def test_indices_compose_as_deletions_do(count: int, rounds: list[set[int]]) -> None:
    left, gone = list(range(count)), {}
    for wanted in rounds:
        removed = sorted(index for index in wanted if index < len(left))
        gone = composed(gone, {"layer": removed}, {"layer": count})
        left = [unit for index, unit in enumerate(left) if index not in removed]
    assert sorted({*range(count)} - set(gone.get("layer", ()))) == left
