"""Folds over shards: each sample lies in one of them, whatever the sizes of the shards."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fleetpress.jobs.planning.fleet import Fold


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(2, 20))
def test_every_sample_is_in_one_fold_and_shards_of_one_sample_fill_them_in_turn(
    sizes: list[int], of: int
) -> None:
    folds = [Fold(index=index, of=of) for index in range(of)]
    held: Counter[int] = Counter()
    for number, size in enumerate(sizes):
        for sample in range(size):
            own = [fold.index for fold in folds if sample % of == fold.in_shard(number).index]
            assert own == [(sample + number) % of]
            held.update(own)
    assert sum(held.values()) == sum(sizes)
    if set(sizes) == {1}:
        counts = [held[index] for index in range(of)]
        assert max(counts) - min(counts) <= 1


def test_the_rest_of_a_fold_turns_with_it() -> None:
    fold = Fold(index=1, of=4, is_left_out=True)
    assert fold.in_shard(0) == fold
    assert fold.in_shard(3) == Fold(index=2, of=4, is_left_out=True)
