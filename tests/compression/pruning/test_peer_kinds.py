"""Every kind of layer that torch-pruning knows: the same units deleted, the same shapes and, where exact, numbers.

What it cannot delete at all (1.6.1: depthwise convolutions with several outputs for an input, splits into parts of
given sizes, nn.RMSNorm, hidden units) is tested against masks in test_structures.py and test_delete.py.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, everyone's name for it

from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import PruneOptions, delete, prune
from fleetpress.compression.pruning.coupling import coupling
from fleetpress.compression.pruning.structure import reading
from fleetpress.compression.pruning.units import output_axis, unit_layers

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [3, 4, 5, 6, 7]])
UNITS = [1, 5]


class Net(nn.Module):
    """Parts, and what is done with them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def chain(*parts: nn.Module) -> Net:
    names = [f"l{i}" for i in range(len(parts))]

    def run(net: Net, x: Tensor) -> Tensor:
        for name in names:
            x = net.get_submodule(name)(x)
        return x

    return Net(run, **dict(zip(names, parts, strict=True)))


def conv(wide_in: int, wide_out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(wide_in, wide_out, 1, groups=groups)


EXACT: dict[str, tuple[Callable[[], Net], Tensor, str]] = {
    "batch-norm": (lambda: chain(conv(3, 8), nn.BatchNorm2d(8), conv(8, 4)), IMAGE, "l0"),
    "depthwise": (lambda: chain(conv(3, 8), conv(8, 8, 8), conv(8, 4)), IMAGE, "l0"),
    "grouped": (lambda: chain(conv(3, 8), conv(8, 12, 2), conv(12, 4)), IMAGE, "l0"),
    "transposed": (lambda: chain(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 4)), IMAGE, "l1"),
    "prelu": (lambda: chain(conv(3, 8), nn.PReLU(8), conv(8, 4)), IMAGE, "l0"),
    "instance-norm": (lambda: chain(conv(3, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 4)), IMAGE, "l0"),
    "flatten": (lambda: chain(conv(3, 8), nn.Flatten(), nn.Linear(8 * 36, 4)), IMAGE, "l0"),
    "concat": (
        lambda: Net(
            lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3, 8), b=conv(3, 6), c=conv(14, 4)
        ),
        IMAGE,
        "b",
    ),
    "chunk": (
        lambda: Net(lambda s, x: s.b(torch.mul(*s.a(x).chunk(2, 1))), a=conv(3, 8), b=conv(4, 2)),
        IMAGE,
        "a",
    ),
    "two-readers": (
        lambda: Net(
            lambda s, x: sum(part(y) for part, y in zip((s.b, s.c), s.a(x).chunk(2, 1), strict=True)),
            a=conv(3, 8),
            b=conv(4, 2),
            c=conv(4, 2),
        ),
        IMAGE,
        "a",
    ),
    "unbind": (
        lambda: Net(lambda s, x: s.b(s.a(x).unbind(1)[0]), a=nn.Linear(6, 8), b=nn.Linear(8, 4)),
        SEQUENCE,
        "a",
    ),
    "residual": (
        lambda: Net(lambda s, x: s.c(s.a(x) + s.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4)),
        IMAGE,
        "a",
    ),
    "embedding": (
        lambda: Net(
            lambda s, x: s.c(s.a(x) + s.b(s.q)),
            a=nn.Embedding(10, 8),
            b=nn.Linear(4, 8),
            c=nn.Linear(8, 4),
            q=nn.Parameter(torch.randn(5, 4)),
        ),
        TOKENS,
        "b",
    ),
    "lstm-inputs": (
        lambda: Net(
            lambda s, x: s.c(s.b(s.a(x))[0]),
            a=nn.Linear(6, 8),
            b=nn.LSTM(8, 6, batch_first=True),
            c=nn.Linear(6, 4),
        ),
        SEQUENCE,
        "a",
    ),
}
NORMS: dict[str, tuple[Callable[[], Net], Tensor, str]] = {
    "layer-norm": (lambda: chain(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)), SEQUENCE, "l0"),
    "group-norm": (lambda: chain(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 4)), IMAGE, "l0"),
}


def both(build: Callable[[], Net], sample: Tensor, layer: str, structure: tuple[str, ...]) -> None:
    """Delete the units and all that goes with them on both sides; compare shapes, and numbers where they are exact."""
    torch.manual_seed(0)
    net = build().eval()
    program = torch.export.export(net, (sample,))
    found = coupling(program, reading(structure))
    known = {
        name: axis
        for name, item in unit_layers(program, structure).items()
        if (axis := output_axis(found, item)) is not None
    }
    gone = found.among(found.classes(known[layer][UNITS]))
    removed = {name: gone[axis].nonzero()[0].tolist() for name, axis in known.items() if gone[axis].any()}
    smaller = delete(program, removed, structure)

    theirs = copy.deepcopy(net)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=sample)
    module = theirs.get_submodule(layer)
    delete_rows = graph.get_pruner_of_module(module).prune_out_channels
    graph.get_pruning_group(module, delete_rows, idxs=UNITS).prune()

    values = tensors(smaller)
    for name, value in theirs.named_parameters():
        assert values[name].shape == value.shape, name
    assert sum(value.numel() for value in theirs.parameters()) < sum(v.numel() for v in net.parameters())
    assert smaller.module()(sample).shape == theirs(sample).shape
    if not structure:
        torch.testing.assert_close(smaller.module()(sample), theirs(sample), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.b._flat_weights")
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("kind", EXACT)
def test_same_shapes_and_numbers(kind: str) -> None:
    both(*EXACT[kind], structure=())


@pytest.mark.parametrize("kind", NORMS)
def test_same_shapes_behind_norms(kind: str) -> None:
    both(*NORMS[kind], structure=("normalized",))


def test_same_heads() -> None:
    """Half of the heads, by the magnitude of their rows: what torch-pruning's pruner gives when told their number."""
    torch.manual_seed(0)
    wide, heads = 16, 4

    def attend(net: Net, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = net.qkv(net.embed(x)).reshape(batch, length, 3, heads, wide // heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*y.unbind(0))
        return net.last(net.proj(out.transpose(1, 2).reshape(batch, length, -1)))

    net = Net(
        attend,
        embed=nn.Linear(6, wide),
        qkv=nn.Linear(wide, 3 * wide, bias=False),
        proj=nn.Linear(wide, wide, bias=False),
        last=nn.Linear(wide, 3),
    )
    with torch.no_grad():  # heads 1 and 2 are small, whatever the score takes together
        for part in range(3):
            net.qkv.weight[part * wide + 4 : part * wide + 12] *= 0.01
        net.proj.weight[:, 4:12] *= 0.01
    net.eval()
    program = torch.export.export(net, (SEQUENCE,))
    options = PruneOptions(method="magnitude", sparsity=0.5, structure=("head",))
    smaller = delete(program, prune(program, options).removed, ("head",))

    theirs = copy.deepcopy(net)
    torch_pruning.pruner.BasePruner(
        theirs,
        SEQUENCE,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        num_heads={theirs.qkv: heads},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        ignored_layers=[theirs.embed, theirs.proj, theirs.last],
    ).step()
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(tensors(smaller)[name], value, rtol=0, atol=0)
