"""Heads, entries of heads, hidden units and normalized channels: what is left computes what it did without them."""

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F  # noqa: N812, everyone's name for it

from fleetpress.compression import cost
from fleetpress.compression.errors import MethodError, PruningError
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import PruneOptions, delete, find_units, prune
from fleetpress.compression.pruning.units import unit_layers

Exported = Callable[[str, bool], tuple[nn.Module, ExportedProgram]]
WIDE, HEADS, SIZE = 16, 4, 4


class Fused(nn.Module):
    """One projection for queries, keys and values, taken apart in the ways that are in use."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.how = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE), how

    def parts(self, y: Tensor) -> list[Tensor]:
        batch, length, _ = y.shape
        if self.how == "unbind":
            return list(y.reshape(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0))
        if self.how == "interleaved":
            return list(y.view(batch, length, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1))
        cut = y.chunk(3, -1)
        if self.how == "slice":
            cut = tuple(y[..., i * WIDE : (i + 1) * WIDE] for i in range(3))
        return [part.view(batch, length, HEADS, SIZE).transpose(1, 2) for part in cut]

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.parts(self.qkv(x))
        if self.how == "written":
            scores = (q @ k.transpose(-2, -1)) * SIZE**-0.5
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
            y = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v
        elif self.how == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(SIZE)
            y = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        elif self.how == "bmm":
            q, k, v = (part.reshape(batch * HEADS, length, SIZE) for part in (q, k, v))
            y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / math.sqrt(SIZE)).softmax(-1), v)
            y = y.view(batch, HEADS, length, SIZE)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, WIDE))


class Shared(nn.Module):
    """Grouped-query attention: `kv` heads of keys and values for all heads of the queries."""

    def __init__(self, kv: int, *, repeat: bool) -> None:
        super().__init__()
        self.kv, self.repeat = kv, repeat
        self.q, self.proj = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.k, self.v = nn.Linear(WIDE, kv * SIZE), nn.Linear(WIDE, kv * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, SIZE).transpose(1, 2)
        k, v = (layer(x).view(batch, length, self.kv, SIZE).transpose(1, 2) for layer in (self.k, self.v))
        if self.repeat:
            k, v = (part.repeat_interleave(HEADS // self.kv, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.repeat)
        return self.proj(y.transpose(1, 2).reshape(batch, length, WIDE))


class Torch(nn.Module):
    """torch's own attention; with `weights` it takes another way, and averages weights that nobody reads."""

    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.mha, self.weights = nn.MultiheadAttention(WIDE, HEADS, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=self.weights)[0]


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.attention = nn.Linear(6, WIDE), nn.LayerNorm(WIDE), attention
        self.head = nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head((y + self.attention(self.norm(y))).mean(1))


FUSED = ("unbind", "interleaved", "slice", "written", "einsum", "bmm")
ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    **{f"fused-{how}": (lambda how=how: Fused(how)) for how in FUSED},
    "grouped": lambda: Shared(2, repeat=False),
    "one-kv-repeat": lambda: Shared(1, repeat=True),
    "torch": lambda: Torch(weights=False),
    "torch-weights": lambda: Torch(weights=True),
}
SAMPLE = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


FREE = {"fused-unbind", "fused-bmm", "one-kv-repeat", "torch", "torch-weights"}


@cache
def made(name: str) -> tuple[nn.Module, ExportedProgram]:
    """A net, and its program; where a view could depend on them, with free sizes of batch and sequence."""
    torch.manual_seed(0)
    net = Net(ATTENTIONS[name]()).double().eval()
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if name in FREE else None
    sample = torch.zeros(2, 4, 6, dtype=torch.float64) if name in FREE else SAMPLE
    return net, torch.export.export(net, (sample,), dynamic_shapes=shapes)


def options(*structure: str, sparsity: float = 0.5) -> PruneOptions:
    return PruneOptions(method="random", sparsity=sparsity, structure=structure)


def with_zeros(model: nn.Module, zeros: dict[str, tuple[int, list[int]]], sample: Tensor) -> Tensor:
    """What the model gives with rows (dim 0) or columns (dim 1) of some parameters at zero."""
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, (dim, places) in zeros.items():
            model.get_parameter(name).index_fill_(dim, torch.tensor(places), 0.0)
        found = model(sample)
        for name, value in kept.items():
            model.get_parameter(name).copy_(value)
    return found


def rows(model: nn.Module, removed: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, list[int]]]:
    """The rows and biases of removed units."""
    names = dict(model.named_parameters())
    found = {}
    for layer, units in removed.items():
        weight = layer if layer in names else f"{layer}.weight"
        bias = weight.replace("weight", "bias")
        found |= {name: (0, list(units)) for name in (weight, bias) if name in names}
    return found


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_are_whole_and_what_is_left_is_exact(name: str) -> None:
    net, program = made(name)
    result = prune(program, options("head"), seed=1)
    smaller = delete(program, result.removed, ("head",))
    found = smaller.module()(SAMPLE)
    # Which heads went is looked up in the outputs: the projection behind them reads zeros in their place.
    out = "attention.mha.out_proj.weight" if "torch" in name else "attention.proj.weight"
    same = []
    for heads in combinations(range(HEADS), HEADS // 2):
        columns = [head * SIZE + i for head in heads for i in range(SIZE)]
        masked = with_zeros(net, {out: (1, columns)}, SAMPLE)
        if torch.allclose(masked, found, rtol=0, atol=1e-12):
            same.append(heads)
    assert len(same) == 1
    assert tensors(smaller)[out].shape == (WIDE, WIDE // 2)
    for layer, units in result.removed.items():
        assert len(units) * 2 == result.units[layer]
    assert set(result.skipped) >= {"embed", "head"}
    # The projections and both products of the attention are half as large.
    assert cost.macs(smaller, batch=4) < cost.macs(program, batch=4)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_entries_of_heads(name: str) -> None:
    net, program = made(name)
    result = prune(program, options("head_dim"), seed=2)
    smaller = delete(program, result.removed, ("head_dim",))
    expected = with_zeros(net, rows(net, dict(result.removed)), SAMPLE)
    torch.testing.assert_close(smaller.module()(SAMPLE), expected, rtol=0, atol=1e-12)
    assert (expected - net(SAMPLE)).abs().max() > 1e-4
    for layer, units in result.removed.items():
        size = tensors(smaller)[unit_layers(smaller)[layer].weights[0]].shape[0]
        assert size == result.units[layer] - len(units) > 0


@pytest.mark.parametrize(
    ("name", "structure"),
    [("bert", "head"), ("torch_encoder", "head"), ("gpt", "head_dim"), ("llama", "head_dim")],
)
def test_language_models(
    name: str, structure: str, architectures: dict[str, Any], exported: Exported
) -> None:
    model, program = exported(name, True)
    result = prune(program, options(structure), seed=4)
    assert not any(layer.endswith(("intermediate", "linear1", "up", "gate")) for layer in result.removed)
    smaller = delete(program, result.removed, (structure,))
    sample = architectures[name].inputs(5)
    expected = with_zeros(model, rows(model, dict(result.removed)), sample)
    torch.testing.assert_close(smaller.module()(sample), expected, rtol=0, atol=1e-9)
    assert (expected - model(sample)).abs().max() > 1e-4


def test_the_scale_is_that_of_the_original_heads() -> None:
    _, program = made("torch")
    smaller = delete(program, prune(program, options("head_dim")).removed, ("head_dim",))
    (node,) = [
        n for n in smaller.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    assert node.kwargs["scale"] == 1 / math.sqrt(SIZE)
    assert node.args[0].meta["val"].shape[-1] == SIZE // 2


def test_structures_that_were_not_asked_for_stay(exported: Exported) -> None:
    _, program = exported("bert", True)
    channels = find_units(program, structure=("channel",))
    assert [group.name for group in channels.groups] == [
        "layers.0.intermediate",
        "layers.1.intermediate",
        "pooler",
    ]
    assert (
        channels.skipped["layers.0.attention.query"]
        == "its units are of structure head, which is not asked for"
    )
    as_ever, both = find_units(program), find_units(program, structure=("head", "channel"))
    assert [(g.name, g.count) for g in as_ever.groups] == [(g.name, g.count) for g in both.groups]
    with pytest.raises(PruningError, match="layer_norm: its statistics mix the units"):
        delete(program, {"layers.0.output": [0]})
    with pytest.raises(MethodError, match="structure 'heads' is unknown; the structures are channel, head,"):
        prune(program, options("heads"))
    with pytest.raises(MethodError, match="keep one of them"):
        prune(program, options("head", "head_dim"))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, bias: bool, states: bool) -> None:
        super().__init__()
        self.rnn = kind(6, 10, 2, batch_first=True, bidirectional=True, bias=bias)
        self.head, self.states = nn.Linear(20, 3), states

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat((state[-2], state[-1]), -1) if self.states else y[:, -1])


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
@pytest.mark.parametrize(("kind", "bias"), [(nn.LSTM, True), (nn.GRU, False), (nn.RNN, True)])
def test_hidden_units(kind: type[nn.RNNBase], bias: bool) -> None:
    torch.manual_seed(0)
    net = Recurrent(kind, bias=bias, states=not bias).double().eval()
    program = torch.export.export(net, (SAMPLE[:2, :2],), dynamic_shapes=({0: Dim.AUTO},))
    wanted = PruneOptions(method="magnitude", sparsity=0.3, structure=("recurrent",))
    units = prune(program, wanted).removed["rnn"]
    assert len(units) == 3
    smaller = delete(program, {"rnn": units}, ("recurrent",))
    both = [*units, *(unit + 10 for unit in units)]
    readers: dict[str, tuple[int, list[int]]] = {"head.weight": (1, both)}
    for name, _ in net.named_parameters():
        if "weight_hh" in name:
            readers[name] = (1, list(units))
        elif "weight_ih_l1" in name:
            readers[name] = (1, both)
    expected = with_zeros(net, readers, SAMPLE[:, :2])
    found = smaller.module()(SAMPLE[:, :2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (expected - net(SAMPLE[:, :2])).abs().max() > 1e-4
    assert tensors(smaller)["rnn.weight_hh_l0"].shape[1] == 7
    assert cost.macs(smaller) < cost.macs(program)
    # The smallest ones went, by all rows of all matrices that belong to a unit.
    squares = torch.zeros(10, dtype=torch.float64)
    for value in net.rnn.parameters():
        squares += value.detach().square().reshape(-1, 10, value[0].numel()).sum((0, 2))
    assert units == tuple(sorted(squares.argsort()[:3].tolist()))
    assert "rnn" not in prune_names(program)


def prune_names(program: ExportedProgram) -> set[str]:
    """Layers that lose something by default."""
    return {name for group in find_units(program).groups for name in group.members}


class Stream(nn.Module):
    """A residual stream with a norm of every kind that has no mean, and one at the end."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.norm, self.gain = nn.RMSNorm(12), nn.Parameter(torch.rand(12) + 0.5)
        self.last, self.head = last, nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = self.gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.head(self.last(x))


IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))


def test_root_mean_square_norms_are_exact() -> None:
    torch.manual_seed(0)
    net = Stream(nn.RMSNorm(12, eps=1e-2)).double().eval()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
    program = torch.export.export(net, (IDS,))
    wanted = options("normalized")
    units = list(prune(program, wanted).removed["down"])
    smaller = delete(program, {"down": units}, ("normalized",))
    writers = {"words.weight": (1, units), "down.weight": (0, units), "down.bias": (0, units)}
    torch.testing.assert_close(smaller.module()(IDS), with_zeros(net, writers, IDS), rtol=0, atol=1e-12)
    assert tensors(smaller)["words.weight"].shape == (20, 6)
    with pytest.raises(PruningError, match="no unit can be deleted"):
        prune(program, PruneOptions(method="random", sparsity=0.5, targets=("down",)))


def test_a_layer_norm_takes_the_mean_of_what_is_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=1e-2), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 1.5)
        net[1].bias.uniform_(-0.5, 0.5)
    program = torch.export.export(net, (SAMPLE[0],))
    smaller = delete(program, {"0": [1, 4, 6]}, ("normalized",))
    kept = [0, 2, 3, 5, 7]
    x = net[0](SAMPLE[0])[:, kept]
    off = x - x.mean(-1, keepdim=True)
    y = off / (off.square().sum(-1, keepdim=True) / 8 + 1e-2).sqrt() * net[1].weight[kept] + net[1].bias[kept]
    expected = y @ net[2].weight[:, kept].T + net[2].bias
    torch.testing.assert_close(smaller.module()(SAMPLE[0]), expected, rtol=0, atol=1e-12)
    assert torch.equal(tensors(program)["1.weight"], net[1].weight), "the input was changed"


def test_a_group_norm_loses_the_same_channels_of_every_group() -> None:
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(2, 12, 3), nn.GroupNorm(3, 12, eps=1e-2), nn.Conv2d(12, 2, 1)).double().eval()
    )
    sample = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    program = torch.export.export(net, (sample,))
    assert find_units(program).groups[0].count == 3
    assert find_units(program, structure=("normalized",)).groups[0].count == 4
    gone = [1, 2, 5, 6, 9, 10]
    kept = [0, 3, 4, 7, 8, 11]
    smaller = delete(program, {"0": gone}, ("normalized",))
    x = net[0](sample)[:, kept].reshape(2, 3, -1)
    off = x - x.mean(-1, keepdim=True)
    y = (off / (off.square().mean(-1, keepdim=True) / 2 + 1e-2).sqrt()).reshape(2, 6, 4, 4)
    expected = F.conv2d(y, net[2].weight[:, kept], net[2].bias)
    torch.testing.assert_close(smaller.module()(sample), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("structure", [("head",), ("channel", "head_dim", "normalized")])
def test_methods_score_every_structure(structure: tuple[str, ...], exported: Exported) -> None:
    _, program = exported("gpt", True)
    result = prune(program, PruneOptions(method="magnitude", sparsity=0.5, structure=structure))
    smaller = delete(program, result.removed, structure)
    again = delete(program, dict(reversed(result.removed.items())), structure)
    assert str(smaller.graph) == str(again.graph)
    assert all(torch.equal(value, tensors(again)[name]) for name, value in tensors(smaller).items())
    values = tensors(smaller)
    assert values["head.weight"].data_ptr() == values["tokens.weight"].data_ptr(), "tied weights stay tied"
    assert cost.parameters(smaller) < cost.parameters(program)
