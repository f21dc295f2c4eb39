"""Every pruning method on every structure: shares are exact, heads go as a whole, and what is left runs."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, everyone's name for it

from fleetpress.compression.errors import PruningError
from fleetpress.compression.observing import calibrate
from fleetpress.compression.pruning import PRUNERS, STRUCTURES, PruneOptions, delete, prune
from fleetpress.compression.training import collect

INPUTS = torch.linspace(-1, 1, 8 * 3 * 6).sin().reshape(8, 3, 6)
SAMPLES = {"inputs": INPUTS, "targets": torch.arange(8) % 3}
WIDE, HEADS = 12, 3


class Net(nn.Module):
    """A layer of attention and one of recurrence in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(6, WIDE), nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE)
        self.norm, self.rnn = nn.LayerNorm(WIDE), nn.GRU(WIDE, 10, batch_first=True)
        self.back, self.head = nn.Linear(10, WIDE), nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        heads = self.qkv(self.norm(x)).view(*x.shape[:2], 3, HEADS, WIDE // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        return self.head((x + self.back(self.rnn(x)[0])).mean(1))


torch.manual_seed(0)
PROGRAM = torch.export.export(Net().eval(), (INPUTS,))
OBSERVED = {name: item.inputs for name, item in calibrate(PROGRAM, SAMPLES, len(INPUTS)).weights.items()}
NEURONS = collect(PROGRAM, SAMPLES, 8, loss="cross_entropy", seed=0, products=True, recurrent=True).neurons()
# Units of a structure, and for each layer how many of its rows belong to one.
UNITS = {
    "channel": (0, {}),
    "head": (HEADS, {"qkv": WIDE // HEADS * 3}),
    "head_dim": (WIDE // HEADS, {"qkv": HEADS * 3}),
    "recurrent": (10, {"rnn": 1}),
    "normalized": (WIDE, {"embed": 1, "proj": 1, "back": 1}),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", sorted(PRUNERS))
def test_units_go_whole_and_in_their_share(method: str, structure: str) -> None:
    count, layers = UNITS[structure]
    wanted = PruneOptions(method=method, sparsity=0.4, structure=(structure,))
    if not count:
        with pytest.raises(PruningError, match="structure head, which is not asked for"):
            prune(PROGRAM, wanted, NEURONS, inputs=OBSERVED)
        return
    removed = prune(PROGRAM, wanted, NEURONS, seed=3, inputs=OBSERVED).removed
    assert {name: len(units) for name, units in removed.items()} == {
        name: rows * math.floor(0.4 * count) for name, rows in layers.items()
    }
    result = delete(PROGRAM, removed, (structure,)).module()(INPUTS)
    assert result.shape == (8, 3)
    assert result.isfinite().all()
    assert (result - PROGRAM.module()(INPUTS)).abs().max() > 0
