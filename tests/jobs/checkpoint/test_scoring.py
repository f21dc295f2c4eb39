"""Chunks of held-out sequences that are scored together: as many as there is room for, none is left out."""

import pytest
import torch

from fleetpress.compression.decoder.passage import Batch
from fleetpress.jobs.checkpoint.scoring import _groups
from fleetpress.jobs.checkpoint.token_data import states_bytes

WIDTH = 8
SIZES = (3, 3, 1, 4)
KEPT = 4 * WIDTH * 5  # bytes of a sequence's hidden states


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [(0, [[3], [3], [1], [4]]), (6, [[3, 3], [1, 4]]), (7, [[3, 3, 1], [4]]), (11, [[3, 3, 1, 4]])],
)
def test_chunks_are_together_while_their_states_fit(sequences: int, expected: list[list[int]]) -> None:
    batches = [Batch(input_ids=torch.zeros(size, 5, dtype=torch.int64)) for size in SIZES]
    working = states_bytes(4 * 5, WIDTH)
    found = list(_groups(batches, WIDTH, working + sequences * KEPT))
    assert [[len(batch) for batch in group] for group in found] == expected
